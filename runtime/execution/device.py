"""Both graphs with all state on a device: arena, tokens and lengths. One thread uses a runner.

All buffers have fixed addresses, so that a step can be captured as a CUDA graph and replayed:

* Rows come in buckets (1, 2, 4, ... slots). A step works on a whole bucket; K/V written to a row
  without a sequence is overwritten when a sequence takes the row.
* A burst of steps runs without the host: see `runtime.execution.rings`.
* The encoder writes image K/V beside the arena; a small graph copies them into their slots, another
  copies text K/V between slots, a third finds more candidates than the likeliest token, and a
  fourth chooses beams behind a step.
* All graphs are in one stream; pixels come in another. So an encoder call can be queued while a
  burst runs: it writes to slots without a sequence, whose rows in the burst are padding.

The runner also works on the CPU provider, where it is tested without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import GraphsFailed
from runtime.execution.arena import Arena
from runtime.execution.base import Candidates, Pending, Search, leading
from runtime.execution.beam_search import BeamSearch, Group
from runtime.execution.buckets import bucket, buckets
from runtime.execution.burst_results import BurstResults
from runtime.execution.device_buffer import DeviceBuffer
from runtime.execution.launch import Launch
from runtime.execution.pixel_upload import PixelUpload
from runtime.execution.rings import Rings
from runtime.execution.stream import open_stream
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
        self._encoded = stream.mark()
        self._filled: set[int] = set()  # slots given to an encoder call since the last `decode`
        self.text_tokens = plan.text_tokens
        self._slots, self._batch = plan.slots, min(plan.encode_batch, plan.slots)
        self._buckets, self._batches = buckets(self._slots), buckets(self._batch)
        combination = manifest.combination(plan.combination)
        graphs = {graph: manifest.variant(graph, combination) for graph in _GRAPHS}
        cache = np.dtype(graphs["decoder"].cache)
        self._names = kv_names(self.sizes.layers)
        self._rings = Rings(stream, BURST, self._slots)
        self._pixels = PixelUpload(stream, self._batches, self.sizes.pixels)
        capacity = np.array([self.sizes.prefix + self.text_tokens], np.int32)
        self._capacity = ort.OrtValue.ortvalue_from_numpy(capacity)
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
        self._search = BeamSearch(stream, searching, self.arena, self._rings, self._logits)
        # Of the last burst and the one before it.
        self._last, self._before = (
            BurstResults(stream, self._rings, self._search) for _ in range(2)
        )
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
        rows = self._pixels.put(pixels)
        encode = self._encodes.get(rows) or self._bind_encode(rows)
        if self._encodes_apart:
            self._pixels.wait()
        encode.run(self.graphs)
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
        rows, prefix = len(tokens), self.sizes.prefix
        self._rings.begin([tokens, *forced], np.add(fed, prefix), padding=prefix)
        burst = self._run_steps(rows, 1 + len(forced), self._search.groups(searches))
        if candidates == 1:
            return burst
        burst.wait()
        return self._likeliest(rows, candidates)

    def proceed(self, steps: int) -> Pending:
        """See ModelRunner."""
        last = self._last
        self._rings.go_on(last.steps)
        return self._run_steps(last.rows, steps, [group.after(last.steps) for group in last.groups])

    def _run_steps(self, rows: int, steps: int, groups: Sequence[Group]) -> "_Burst":
        size = bucket(rows, self._buckets)
        self._filled.clear()
        for step in range(steps):
            launch = self._steps.get((size, step)) or self._bind_step(size, step)
            launch.run(self.graphs)
            self._search.step(step, groups)
        self._before, self._last = self._last, self._before
        self._last.fetch(rows, steps, groups)
        return _Burst(self, self._last)

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

    def clear(self, slot: int) -> None:
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
        self._pixels.buffers[rows].rows(rows).as_input(binding, "pixels")
        for array, name in enumerate(self._names):
            self._images.rows(rows, array * rows).as_output(binding, f"image.{name}")
        number = self._batches.index(rows) + 1
        launch = Launch(self._encoder, binding, number, wait=self._encodes_apart)
        self._encodes[rows] = launch
        return launch

    def _bind_step(self, rows: int, step: int) -> Launch:
        binding, rings = self._decoder.io_binding(), self._rings
        then = step + 1
        rings.row(rings.tokens, step, rows).shaped(rows, 1).as_input(binding, "token_ids")
        rings.row(rings.lengths, step, rows).as_input(binding, "lengths")
        rings.row(rings.tokens, then, rows).as_input(binding, "forced")
        rings.row(rings.tokens, then, rows).as_output(binding, "next_ids")
        rings.row(rings.logprobs, then, rows).as_output(binding, "next_logprobs")
        rings.row(rings.lengths, then, rows).as_output(binding, "next_lengths")
        self._logits.rows(rows).as_output(binding, "logits")
        # A captured graph fixes the value; kernels use each row's own length.
        binding.bind_ortvalue_input("total_length", self._capacity)
        self.arena.bind(binding, rows)
        launch = Launch(
            self._decoder, binding, 1 + step * len(self._buckets) + self._buckets.index(rows)
        )
        self._steps[rows, step] = launch
        return launch


@dataclass(frozen=True, slots=True)
class _Burst:
    """A burst that is queued or has run. The runner does not refer to it: a runner that is dropped
    is freed at once, and its memory on the device with it.
    """

    runner: DeviceRunner
    results: BurstResults

    def wait(self) -> Candidates:
        found, failed = self.results.wait(self.runner.bucket(self.results.rows))
        for row in failed:
            self.runner.clear(row)
        return found
