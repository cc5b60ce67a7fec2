"""Both graphs with all state on a device: arena, tokens and lengths. One thread uses a runner.

All buffers have fixed addresses, so that a step can be captured as a CUDA graph and replayed:

* Rows come in buckets (1, 2, 4, ... slots). A step works on a whole bucket; K/V written to a row
  without a sequence is overwritten when a sequence takes the row.
* Step j of a burst reads row j of a ring of tokens and lengths and writes row j + 1, so the steps
  run without the host, which uploads the ring before the burst and fetches the results after it.
* The encoder writes image K/V beside the arena; a small graph copies them into their slots, another
  copies text K/V between slots, a third finds more candidates than the likeliest token, and a
  fourth chooses beams behind a step.
* All graphs are in one stream; a second one has the pixels that are on their way. So an encoder
  call can be queued while a burst runs: it writes to slots without a sequence, whose rows in the
  burst are padding.

The runner also works on the CPU provider, where it is tested without a GPU.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from math import prod
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import GraphsFailed
from runtime.execution.arena import Arena
from runtime.execution.base import Candidates, Pending, Search, leading
from runtime.execution.beam_search import BeamSearch, Group, Rings
from runtime.execution.buckets import bucket, buckets
from runtime.execution.device_buffer import DeviceBuffer, pinned
from runtime.execution.launch import Launch
from runtime.execution.stream import Stream, open_stream
from runtime.model.manifest import HELPERS, UNFORCED, Manifest, kv_names
from runtime.planning.plan import Plan
from runtime.providers.cuda import CudaOptions
from runtime.providers.session import Placement, open_session

BURST = 4  # most steps between two fetches: a row ending in the first wastes three
_RUNS_BEFORE_CAPTURE = 2
# Rows. On an H200 a move takes the host 0.4 ms, and 32 rows fewer save 0.05 ms of each step.
_MOVE_COST = 32
_GRAPHS = ("encoder", "decoder", *HELPERS)


class DeviceRunner:
    """ModelRunner with its state on a device; `decode` runs a burst of steps."""

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan) -> None:
        self.sizes, self.plan, self.burst = manifest.sizes, plan, BURST
        self._device = device = "cpu" if plan.decoder_provider == "cpu" else "cuda"
        self._stream = stream = open_stream(device)
        self._taken, self._encoded = stream.mark(), stream.mark()
        self._uploads = open_stream(device)  # of pixels, while graphs run
        self._staged = self._uploads.mark()
        self._filled: set[int] = set()  # slots given to an encoder call since the last `decode`
        self.text_tokens = plan.text_tokens
        self._slots, self._batch = plan.slots, min(plan.encode_batch, plan.slots)
        self._buckets, self._batches = buckets(self._slots), buckets(self._batch)
        combination = manifest.combination(plan.combination)
        graphs = {graph: manifest.variant(graph, combination) for graph in _GRAPHS}
        cache = np.dtype(graphs["decoder"].cache)
        self._names = kv_names(self.sizes.layers)
        self._ring = BURST + 1, self._slots + 1
        self._tokens = DeviceBuffer(device, (prod(self._ring),), np.int64)
        self._lengths = DeviceBuffer(device, (prod(self._ring),), np.int32)
        self._logprobs = DeviceBuffer(device, (prod(self._ring), 1), np.float32)
        self._host_tokens = np.zeros(self._ring, np.int64)
        self._host_lengths = np.zeros(self._ring, np.int32)
        capacity = np.array([self.sizes.prefix + self.text_tokens], np.int32)
        self._capacity = ort.OrtValue.ortvalue_from_numpy(capacity)
        self._arrived = DeviceBuffer(device, (self._batch, *self.sizes.pixels), np.uint8)
        self._pixels = {
            rows: DeviceBuffer(device, (rows, *self.sizes.pixels), np.uint8)
            for rows in self._batches
        }
        self._staging = pinned(device, (self._batch, *self.sizes.pixels), np.uint8)
        self._staging_rows = [row.data for row in self._staging.reshape(self._batch, -1)]
        captured = CudaOptions(plan.memory_limit, plan.cuda_graphs, stream.handle)
        encode_on = Placement(
            plan.encoder_provider, plan.encoder_threads, folder, half=True, cuda=captured,
            batch=self._batch, row=self.sizes.pixels,
        )  # fmt: skip
        decode_on = Placement(plan.decoder_provider, plan.decoder_threads, cuda=captured)
        self._encoder = open_session(folder / graphs["encoder"].file, encode_on)
        self._decoder = open_session(folder / graphs["decoder"].file, decode_on)
        [logits] = (o.shape[1:] for o in self._decoder.get_outputs() if o.name == "logits")
        self._logits = DeviceBuffer(device, (self._slots, *logits), cache)
        beside = replace(decode_on, cuda=replace(captured, graphs=False))
        *copying, self._candidates, searching = (
            open_session(folder / graphs[name].file, beside) for name in HELPERS
        )
        _, *image = self._encoder.get_outputs()[0].shape
        self._images = DeviceBuffer(device, (len(self._names) * self._batch, *image), cache)
        # Encoders for CUDA leave heads where the products have put them.
        apart = image[0] != self.sizes.heads
        self.arena = Arena(stream, self.sizes, self._slots, self.text_tokens, cache, copying, apart)
        rings = Rings(BURST, self._tokens, self._logprobs, self._logits)
        self._search = BeamSearch(stream, searching, self.arena, rings)
        # Of the last burst and the one before it.
        self._last, self._before = _Results(self, stream), _Results(self, stream)
        # TensorRT has a stream of its own: before and after it, the host waits.
        self._encodes_apart = plan.encoder_provider == "tensorrt"
        self.overlaps = not self._encodes_apart
        self.searches, self.move_cost = True, _MOVE_COST
        self.graphs = False  # until warm_up has captured them
        self._encodes: dict[int, Launch] = {}
        self._steps: dict[tuple[int, int], Launch] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU; it is the CPU otherwise."""
        return self._device != "cpu"

    @property
    def runs_on(self) -> str:
        """For people: providers, precisions, and memory of the slots."""
        graphs = "" if self.graphs else ", without CUDA graphs"
        return f"{self.plan.describe(self.arena.nbytes)} on the device{graphs}"

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        """See ModelRunner. pixels: uint8, at most the plan's encode batch of images."""
        rows = bucket(len(pixels), self._batches)
        self._staged.wait()
        for row, image in zip(self._staging_rows, pixels, strict=False):
            row[:] = image.reshape(-1).data  # unlike NumPy's copy, it keeps Python's lock
        self._uploads.after(self._taken)
        self._arrived.upload(self._staging[:rows], self._uploads)
        self._staged.set()
        self._stream.after(self._staged)
        self._pixels[rows].take(self._arrived, self._stream)
        self._taken.set()
        encode = self._encodes.get(rows) or self._bind_encode(rows)
        if self._encodes_apart:
            self._taken.wait()
        encode.run(self.graphs, wait=self._encodes_apart)
        images = self._images.rows(len(self._names) * rows)
        images = images.shaped(len(self._names), rows, *images.shape[1:])
        # The first slot of each image, then the second of each image that has one, and so on.
        for targets in zip_longest(*slots, fillvalue=self.arena.sink):
            self.arena.insert(images, targets)
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
        searches: Sequence[Search] = (),
    ) -> Pending:
        """See ModelRunner."""
        rows, steps = len(tokens), 1 + len(forced)
        # Rows 1, 2, ... hold forced tokens until the step before overwrites them with its choice.
        self._host_tokens[1:] = UNFORCED
        self._host_tokens[:steps, :rows] = [tokens, *forced]
        self._host_lengths[0, :rows] = np.add(fed, self.sizes.prefix)
        self._host_lengths[0, rows:] = self.sizes.prefix  # padding rows
        self._tokens.upload(self._host_tokens.reshape(-1), self._stream)
        self._lengths.upload(self._host_lengths.reshape(-1), self._stream)
        burst = self._run_steps(rows, steps, self._search.groups(searches))
        if candidates == 1:
            return burst
        burst.wait()
        return self._likeliest(rows, candidates)

    def proceed(self, steps: int) -> Pending:
        """See ModelRunner."""
        last, width = self._last, self._ring[1]
        for ring in (self._tokens, self._lengths):
            ring.repeat(last.steps * width, width, self._stream)
        self._host_tokens[1:] = UNFORCED
        self._tokens.upload(self._host_tokens[1:].reshape(-1), self._stream, width)
        return self._run_steps(last.rows, steps, [group.after(last.steps) for group in last.groups])

    def _run_steps(self, rows: int, steps: int, groups: Sequence[Group]) -> "_Results":
        size = bucket(rows, self._buckets)
        self._filled.clear()
        for step in range(steps):
            launch = self._steps.get((size, step)) or self._bind_step(size, step)
            launch.run(self.graphs)
            self._search.step(step, groups)
        self._before, self._last = self._last, self._before
        self._last.fetch(rows, steps, groups)
        return self._last

    def results(self, found: "_Results") -> Candidates:
        """Of steps that have ended, the tokens that they chose."""
        chosen = slice(1, found.steps + 1)
        logprobs, predicted = (
            ring[chosen, :, None].copy() for ring in (found.logprobs, found.tokens)
        )
        # Also in padding rows, whose slots a sequence may have left before its first step.
        failed = np.isnan(logprobs[:, : self.bucket(found.rows)]).any(axis=(0, 2))
        for row in np.flatnonzero(failed):
            self._clear(int(row))
        searches = [group.results(found.best, found.steps) for group in found.groups]
        rows = slice(found.rows)
        return Candidates(predicted[:, rows], logprobs[:, rows], searches=searches)

    def _likeliest(self, rows: int, candidates: int) -> Candidates:
        """The likeliest tokens, from the logits that the last step left on the device."""
        binding = self._candidates.io_binding()
        self._logits.rows(rows).shaped(rows, -1).as_input(binding, "logits")
        binding.bind_cpu_input("candidates", np.array([candidates], np.int64))
        for name in ("candidate_ids", "candidate_logprobs", "best_logits"):
            binding.bind_output(name, "cpu")
        self._candidates.run_with_iobinding(binding)
        ids, logprobs, best = (value.numpy() for value in binding.get_outputs())
        # Among equally likely tokens the decoder's choice comes first, as without candidates.
        chosen = self._last.tokens[1, :rows]
        for row in np.flatnonzero(ids[:, 0] != chosen):
            for place in np.flatnonzero(ids[row] == chosen[row]):
                ids[row, [0, place]] = ids[row, [place, 0]]
        return Candidates(ids[None], logprobs[None], best.T)

    def _clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN: a kernel may mask by multiplying with zero, and zero times
        NaN is NaN for the next sequence in the slot. If that one's image is there, it stays.
        """
        if slot in self._filled:
            self.reorder([(self.arena.blank, slot)], self.text_tokens)
            return
        self.arena.clear(slot)

    def bucket(self, rows: int) -> int:
        """See ModelRunner; the smallest captured bucket."""
        return bucket(rows, self._buckets)

    def move(self, source: int, target: int) -> None:
        """See ModelRunner."""
        self.arena.move(source, target)

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """See ModelRunner."""
        self.arena.reorder(moves, fed)

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
        if self._slots > 1:
            self._search_widely()
        everything = [(slot, slot) for slot in range(self._slots)]
        self.reorder(everything, self.text_tokens)  # later ones take no more memory
        self.move(0, self._slots - 1)

    def _search_widely(self) -> None:
        """Search in all slots, over all text positions: later searches take no more memory."""
        images = self._slots // 2
        slots = np.arange(2 * images).reshape(images, 2).tolist()
        scores = np.zeros((images, 2), np.float32)
        fed = [self.text_tokens - 1] * 2 * images
        search = Search(slots, scores, [UNFORCED] * images, 0, fed[0])
        self.decode([0] * len(fed), fed, searches=[search]).wait()

    def _bind_encode(self, rows: int) -> Launch:
        binding = self._encoder.io_binding()
        self._pixels[rows].rows(rows).as_input(binding, "pixels")
        for array, name in enumerate(self._names):
            self._images.rows(rows, array * rows).as_output(binding, f"image.{name}")
        launch = Launch(self._encoder, binding, self._batches.index(rows) + 1)
        self._encodes[rows] = launch
        return launch

    def _bind_step(self, rows: int, step: int) -> Launch:
        binding = self._decoder.io_binding()
        _, width = self._ring
        now, then = step * width, (step + 1) * width
        self._tokens.rows(rows, now).shaped(rows, 1).as_input(binding, "token_ids")
        self._lengths.rows(rows, now).as_input(binding, "lengths")
        self._tokens.rows(rows, then).as_input(binding, "forced")
        self._tokens.rows(rows, then).as_output(binding, "next_ids")
        self._logprobs.rows(rows, then).as_output(binding, "next_logprobs")
        self._logits.rows(rows).as_output(binding, "logits")
        self._lengths.rows(rows, then).as_output(binding, "next_lengths")
        # A captured graph fixes the value; kernels use each row's own length.
        binding.bind_ortvalue_input("total_length", self._capacity)
        self.arena.bind(binding, rows)
        launch = Launch(
            self._decoder, binding, 1 + step * len(self._buckets) + self._buckets.index(rows)
        )
        self._steps[rows, step] = launch
        return launch


class _Results:
    """Host memory for the results of a burst that is queued or has run."""

    def __init__(self, runner: DeviceRunner, stream: Stream) -> None:
        self._runner, self._stream, self._ended = runner, stream, stream.mark()
        self.rows = self.steps = 0
        self.groups: Sequence[Group] = ()
        self.logprobs, self.tokens = (
            pinned(stream.device, runner._ring, ring.dtype)
            for ring in (runner._logprobs, runner._tokens)
        )
        self.best = {
            name: pinned(stream.device, runner._search.shape, buffer.dtype)
            for name, buffer in runner._search.best.items()
        }

    def fetch(self, rows: int, steps: int, groups: Sequence[Group]) -> None:
        """Queue the copies of what the burst finds."""
        self.rows, self.steps, self.groups = rows, steps, groups
        self._runner._logprobs.download(self.logprobs, self._stream)
        self._runner._tokens.download(self.tokens, self._stream)
        if groups:
            for name, buffer in self._runner._search.best.items():
                buffer.download(self.best[name], self._stream)
        self._ended.set()

    def wait(self) -> Candidates:
        self._ended.wait()
        return self._runner.results(self)
