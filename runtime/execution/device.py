"""Both graphs with all state on a device: arena, tokens and lengths. One thread uses a runner.

All buffers have fixed addresses, so that a step can be captured as a CUDA graph and replayed:

* Rows come in buckets (1, 2, 4, ... slots). A step works on a whole bucket; K/V written to a row
  without a sequence is overwritten when a sequence takes the row.
* Step j of a burst reads row j of a ring of tokens and lengths and writes row j + 1, so the steps
  run without the host, which uploads the ring before the burst and fetches the results after it.
* The encoder writes image K/V beside the arena; a small graph copies them into their slots, another
  copies text K/V between slots, a third finds more candidates than the likeliest token.
* All graphs and copies are in one stream. So an encoder call can be queued while a burst runs: it
  writes to slots without a sequence, whose rows in the burst are padding.

The runner also works on the CPU provider, where it is tested without a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.errors import GraphsFailed
from runtime.execution.base import Candidates, Pending, leading
from runtime.execution.device_buffer import DeviceBuffer, View
from runtime.execution.stream import Stream, open_stream
from runtime.model.manifest import PIECE, UNFORCED, Manifest, kv_names
from runtime.planning.plan import Plan
from runtime.providers.cuda import CudaOptions, pin
from runtime.providers.session import Placement, open_session

BURST = 4  # most steps between two fetches: a row ending in the first wastes three
_RUNS_BEFORE_CAPTURE = 2
_BETWEEN_FROM = 64  # rows: up to here a step takes as long for twice as many
_GRAPHS = ("encoder", "decoder", "insert", "reorder", "candidates")


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of rows that graphs are captured for: 1, 2, 4, ... 64, 96, 128, 192, ... and `most`.

    A larger step takes longer, and half as many sizes again cost little to capture.
    """
    powers = [1 << n for n in range(most.bit_length())]
    between = [p + p // 2 for p in powers if p >= _BETWEEN_FROM]
    return (*(n for n in sorted(powers + between) if n < most), most)


def bucket(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that holds `rows`."""
    return next(size for size in sizes if size >= rows)


_NO_GRAPH = -1  # graph id that disables capture


class _Launch:
    """A session with its bindings, and the id of the CUDA graph captured from them."""

    def __init__(self, session: ort.InferenceSession, binding: Any, graph_id: int) -> None:
        self._session, self._binding = session, binding
        self._options = {
            (graph, wait): _run_options(graph_id if graph else _NO_GRAPH, wait)
            for graph in (True, False)
            for wait in (True, False)
        }

    def run(self, graph: bool, wait: bool = False) -> None:
        """Queue a run of the session. wait: return only when it has ended.

        graph: replay the captured CUDA graph; the first such run captures it.
        """
        self._session.run_with_iobinding(self._binding, self._options[graph, wait])


def _run_options(graph_id: int, wait: bool) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options


class DeviceRunner:
    """ModelRunner with its state on a device; `decode` runs a burst of steps."""

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan) -> None:
        self.sizes, self.plan, self.burst = manifest.sizes, plan, BURST
        self._device = device = "cpu" if plan.decoder_provider == "cpu" else "cuda"
        self._stream = stream = open_stream(device)
        self._staged, self._encoded, self._decoded = (stream.mark() for _ in range(3))
        self._filled: set[int] = set()  # slots given to an encoder call since the last `decode`
        self.text_tokens = plan.text_tokens
        self._slots, self._batch = plan.slots, min(plan.encode_batch, plan.slots)
        self._buckets, self._batches = buckets(self._slots), buckets(self._batch)
        self._names = kv_names(self.sizes.layers)
        combination = manifest.combination(plan.combination)
        graphs = {graph: manifest.variant(graph, combination) for graph in _GRAPHS}
        cache = np.dtype(graphs["decoder"].cache)
        heads, head, prefix = self.sizes.heads, self.sizes.head, self.sizes.prefix
        capacity = prefix + self.text_tokens
        slot, image = (heads, capacity, head), (heads, prefix, head)
        # A spare slot: the sink for padding rows.
        self._arena = [DeviceBuffer(device, (self._slots + 1, *slot), cache) for _ in self._names]
        self._images = [DeviceBuffer(device, (self._batch, *image), cache) for _ in self._names]
        self._blank = DeviceBuffer(device, (1, *slot), cache)
        self._ring = BURST + 1, self._slots
        self._tokens = DeviceBuffer(device, (prod(self._ring),), np.int64)
        self._lengths = DeviceBuffer(device, (prod(self._ring),), np.int32)
        self._logprobs = DeviceBuffer(device, (prod(self._ring), 1), np.float32)
        self._logits = DeviceBuffer(device, (self._slots, self.sizes.vocabulary), cache)
        self._host_tokens = np.zeros(self._ring, np.int64)
        self._host_lengths = np.zeros(self._ring, np.int32)
        self._capacity = ort.OrtValue.ortvalue_from_numpy(np.array([capacity], np.int32))
        pieces = head * cache.itemsize // (PIECE * 8)  # per K/V vector
        self._slot_pieces = heads * capacity * pieces
        self._pieces = pieces
        self._image_places, self._slot_places = (
            _uploaded(device, stream, places)
            for places in (
                _places(heads, prefix * pieces, capacity * pieces),
                _places(1, self._slot_pieces, self._slot_pieces),
            )
        )
        self._firsts = DeviceBuffer(device, (self._batch, 1, 1), np.int64)
        self._pixels = {
            rows: DeviceBuffer(device, (rows, *self.sizes.pixels), np.uint8)
            for rows in self._batches
        }
        self._staging = np.zeros((self._batch, *self.sizes.pixels), np.uint8)
        self._staging_rows = [row.data for row in self._staging.reshape(self._batch, -1)]
        if device == "cuda":
            pin(self._staging)
        captured = CudaOptions(plan.memory_limit, plan.cuda_graphs, stream.handle)
        encode_on = Placement(
            plan.encoder_provider, plan.encoder_threads, folder, half=True, cuda=captured,
            batch=self._batch, row=self.sizes.pixels,
        )  # fmt: skip
        decode_on = Placement(plan.decoder_provider, plan.decoder_threads, cuda=captured)
        self._encoder = open_session(folder / graphs["encoder"].file, encode_on)
        self._decoder = open_session(folder / graphs["decoder"].file, decode_on)
        beside = replace(decode_on, cuda=replace(captured, graphs=False))
        self._insert, self._reorder, self._candidates = (
            open_session(folder / graphs[name].file, beside)
            for name in ("insert", "reorder", "candidates")
        )
        # TensorRT has a stream of its own: before and after it, the host waits.
        self._encodes_apart = plan.encoder_provider == "tensorrt"
        self.overlaps = not self._encodes_apart
        self.graphs = False  # until warm_up has captured them
        self._encodes: dict[int, _Launch] = {}
        self._inserts: dict[int, _Launch] = {}
        self._steps: dict[tuple[int, int], _Launch] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; it is the CPU otherwise."""
        return self._device != "cpu"

    @property
    def runs_on(self) -> str:
        """For people: providers, precisions, and memory of the slots."""
        arena = sum(cache.nbytes for cache in self._arena)
        graphs = "" if self.graphs else ", without CUDA graphs"
        return f"{self.plan.describe(arena)} on the device{graphs}"

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        """See ModelRunner. pixels: uint8, at most the plan's encode batch of images."""
        rows = bucket(len(pixels), self._batches)
        self._staged.wait()
        for row, image in zip(self._staging_rows, pixels, strict=False):
            row[:] = image.reshape(-1).data  # unlike NumPy's copy, it keeps Python's lock
        self._pixels[rows].upload(self._staging[:rows], self._stream)
        self._staged.set()
        encode = self._encodes.get(rows) or self._bind_encode(rows)
        if self._encodes_apart:
            self._staged.wait()
        encode.run(self.graphs, wait=self._encodes_apart)
        insert = self._inserts.get(rows) or self._bind_insert(rows)
        # The first slot of each image, then the second of each image that has one, and so on.
        for targets in zip_longest(*slots, fillvalue=self._slots):
            self._copy_to(targets, insert)
        self._filled.update(*slots)
        self._encoded.set()

    def wait_encoded(self) -> None:
        """See ModelRunner."""
        self._encoded.wait()

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
    ) -> Pending:
        """See ModelRunner."""
        rows, steps = len(tokens), 1 + len(forced)
        size = bucket(rows, self._buckets)
        # Rows 1, 2, ... hold forced tokens until the step before overwrites them with its choice.
        self._host_tokens[1:] = UNFORCED
        self._host_tokens[:steps, :rows] = [tokens, *forced]
        self._host_lengths[0, :rows] = np.add(fed, self.sizes.prefix)
        self._host_lengths[0, rows:] = self.sizes.prefix  # padding rows
        self._tokens.upload(self._host_tokens.reshape(-1), self._stream)
        self._lengths.upload(self._host_lengths.reshape(-1), self._stream)
        self._filled.clear()
        for step in range(steps):
            launch = self._steps.get((size, step)) or self._bind_step(size, step)
            launch.run(self.graphs)
        self._decoded.set()
        burst = _Burst(self, rows, steps)
        if candidates == 1:
            return burst
        burst.wait()
        return self._likeliest(rows, candidates)

    def results(self, rows: int, steps: int) -> Candidates:
        """Wait for the last `decode`; the tokens that it chose."""
        self._decoded.wait()
        logprobs, predicted = (
            ring.fetch().reshape(self._ring)[1 : steps + 1, :, None]
            for ring in (self._logprobs, self._tokens)
        )
        # Also in padding rows, whose slots a sequence may have left before its first step.
        for row in np.flatnonzero(np.isnan(logprobs[:, : self.bucket(rows)]).any(axis=(0, 2))):
            self._clear(int(row))
        return Candidates(predicted[:, :rows], logprobs[:, :rows])

    def _likeliest(self, rows: int, candidates: int) -> Candidates:
        """The likeliest tokens, from the logits that the last step left on the device."""
        binding = self._candidates.io_binding()
        self._logits.rows(rows).as_input(binding, "logits")
        binding.bind_cpu_input("candidates", np.array([candidates], np.int64))
        for name in ("candidate_ids", "candidate_logprobs", "best_logits"):
            binding.bind_output(name, "cpu")
        self._candidates.run_with_iobinding(binding)
        ids, logprobs, best = (value.numpy() for value in binding.get_outputs())
        # Among equally likely tokens the decoder's choice comes first, as without candidates.
        chosen = self._tokens.fetch().reshape(self._ring)[1, :rows]
        for row in np.flatnonzero(ids[:, 0] != chosen):
            for place in np.flatnonzero(ids[row] == chosen[row]):
                ids[row, [0, place]] = ids[row, [place, 0]]
        return Candidates(ids[None], logprobs[None], best.T)

    def _clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN: a kernel may mask by multiplying with zero, and zero times
        NaN is NaN for the next sequence in the slot. If that one's image is there, it stays.
        """
        if slot in self._filled:
            self.reorder([(self._slots, slot)], self.text_tokens)  # the spare slot has no text
            return
        blank = [self._blank.rows(1)] * len(self._names)
        self._copy_to([slot], self._bind_copy(blank, self._slot_places))

    def bucket(self, rows: int) -> int:
        """See ModelRunner; the smallest captured bucket."""
        return bucket(rows, self._buckets)

    def move(self, source: int, target: int) -> None:
        """See ModelRunner."""
        sources = [cache.rows(1, source) for cache in self._arena]
        self._copy_to([target], self._bind_copy(sources, self._slot_places))

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """See ModelRunner."""
        heads, prefix = self.sizes.heads, self.sizes.prefix
        room = (prefix + self.text_tokens) * self._pieces  # pieces per head
        text = np.arange(prefix * self._pieces, (prefix + fed) * self._pieces)
        places = (np.arange(heads)[:, None] * room + text).reshape(-1)
        sources, targets = (
            np.add.outer(np.array(slots) * self._slot_pieces, places).reshape(-1)
            for slots in zip(*moves, strict=True)
        )
        binding = self._reorder.io_binding()
        binding.bind_cpu_input("sources", sources)
        binding.bind_cpu_input("targets", targets[:, None])
        for name, cache in zip(self._names, self._arena, strict=True):
            arena = cache.rows(self._slots + 1).shaped(-1, PIECE, dtype=np.int64)
            arena.as_input(binding, f"arena.{name}")
            arena.as_output(binding, f"reordered.{name}")
        self._reorder.run_with_iobinding(binding)  # it waits: `sources` and `targets` are freed

    def warm_up(self) -> None:
        """Run all graphs, encoder and decoder in all sizes; capture these if CUDA graphs are on.

        Raises GraphsFailed if they run but can't be captured.
        """
        # Allocation and algorithm selection happen in these runs, never during capture.
        for _ in range(_RUNS_BEFORE_CAPTURE):
            self._run_all()
        if not self.plan.cuda_graphs:
            return
        self.graphs = True
        try:
            self._run_all()
        except Exception as cause:
            raise GraphsFailed(f"a CUDA graph can't be captured: {cause}") from cause

    def _run_all(self) -> None:
        blank = np.zeros(self.sizes.pixels, np.uint8)
        for batch in self._batches:
            self.encode([blank] * batch, leading(batch))
        self.wait_encoded()
        for size in self._buckets:
            steps = min(self.burst, self.text_tokens)
            self.decode([0] * size, [0] * size, [[UNFORCED] * size] * (steps - 1)).wait()
        self.decode([0], [0], candidates=2)
        everything = [(slot, slot) for slot in range(self._slots)]
        self.reorder(everything, self.text_tokens)  # later ones take no more memory
        self.move(0, self._slots - 1)

    def _bind_encode(self, rows: int) -> _Launch:
        binding = self._encoder.io_binding()
        self._pixels[rows].rows(rows).as_input(binding, "pixels")
        for name, image in zip(self._names, self._images, strict=True):
            image.rows(rows).as_output(binding, f"image.{name}")
        launch = _Launch(self._encoder, binding, self._batches.index(rows) + 1)
        self._encodes[rows] = launch
        return launch

    def _bind_step(self, rows: int, step: int) -> _Launch:
        binding = self._decoder.io_binding()
        now, then = step * self._slots, (step + 1) * self._slots
        self._tokens.rows(rows, now).shaped(rows, 1).as_input(binding, "token_ids")
        self._lengths.rows(rows, now).as_input(binding, "lengths")
        self._tokens.rows(rows, then).as_input(binding, "forced")
        self._tokens.rows(rows, then).as_output(binding, "next_ids")
        self._logprobs.rows(rows, then).as_output(binding, "next_logprobs")
        self._logits.rows(rows).as_output(binding, "logits")
        self._lengths.rows(rows, then).as_output(binding, "next_lengths")
        # A captured graph fixes the value; kernels use each row's own length.
        binding.bind_ortvalue_input("total_length", self._capacity)
        for name, cache in zip(self._names, self._arena, strict=True):
            cache.rows(rows).as_input(binding, f"past_key_values.{name}")
            cache.rows(rows).as_output(binding, f"present.{name}")
        launch = _Launch(
            self._decoder, binding, 1 + step * len(self._buckets) + self._buckets.index(rows)
        )
        self._steps[rows, step] = launch
        return launch

    def _bind_insert(self, rows: int) -> _Launch:
        images = [image.rows(rows) for image in self._images]
        launch = self._inserts[rows] = self._bind_copy(images, self._image_places)
        return launch

    def _bind_copy(self, sources: list[View], places: DeviceBuffer) -> _Launch:
        """Bind a copy of `sources` to `places` in the slots that `_firsts` names."""
        binding = self._insert.io_binding()
        count, rows = places.shape[1], sources[0].shape[0]
        places.rows(1).as_input(binding, "pieces")
        self._firsts.rows(rows).as_input(binding, "firsts")
        for name, source, cache in zip(self._names, sources, self._arena, strict=True):
            arena = cache.rows(self._slots + 1).shaped(-1, PIECE, dtype=np.int64)
            source.shaped(rows, count, PIECE, dtype=np.int64).as_input(binding, f"image.{name}")
            arena.as_input(binding, f"arena.{name}")
            arena.as_output(binding, f"inserted.{name}")
        return _Launch(self._insert, binding, _NO_GRAPH)

    def _copy_to(self, slots: Sequence[int], launch: _Launch) -> None:
        firsts = np.full((self._batch, 1, 1), self._slots, np.int64)
        firsts[: len(slots), 0, 0] = slots
        self._firsts.upload(firsts * self._slot_pieces, self._stream)
        launch.run(graph=False)


class _Burst:
    """Decode steps that are queued or have run."""

    def __init__(self, runner: DeviceRunner, rows: int, steps: int) -> None:
        self._runner, self._rows, self._steps = runner, rows, steps

    def wait(self) -> Candidates:
        return self._runner.results(self._rows, self._steps)


def _places(heads: int, used: int, room: int) -> np.ndarray:
    """int64 `[1, heads * used, 1]`: indices of the first `used` of each head's `room` pieces."""
    return (np.arange(heads)[:, None] * room + np.arange(used)).reshape(1, -1, 1)


def _uploaded(device: str, stream: Stream, array: np.ndarray) -> DeviceBuffer:
    buffer = DeviceBuffer(device, array.shape, array.dtype)
    buffer.upload(array, stream)
    return buffer
