"""Both graphs, the K/V arena, and the bindings between them. One thread uses a runner.

Arena: for each layer a key and a value array `[slots, heads, C, head]` with C = prefix + text
positions. A decode step binds the leading rows of these arrays as both past and present, so the
decoder graph appends each new token's K/V in place and no cache is copied between steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.execution.base import Candidates, Search, leading
from runtime.execution.encoder import Encoder
from runtime.model.manifest import EXACT, Manifest, kv_names
from runtime.planning.plan import Plan
from runtime.providers.cuda import CudaOptions
from runtime.providers.session import Placement, open_session


@dataclass(frozen=True, slots=True)
class _Step:
    """Bindings of a decode step over a fixed number of rows, and the arrays of its results."""

    binding: Any  # onnxruntime.IOBinding
    found: Candidates


class HostRunner:
    """ModelRunner with its state in host memory; `decode` runs one step."""

    burst = 1
    graphs = False
    on_gpu = False
    overlaps = searches = False
    move_cost = 1

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan) -> None:
        self.sizes, self.plan = manifest.sizes, plan
        self.text_tokens = plan.text_tokens
        combination = manifest.combination(plan.combination)
        encoder, decoder = (manifest.variant(g, combination) for g in ("encoder", "decoder"))
        self._image_names = [f"image.{name}" for name in kv_names(self.sizes.layers)]
        self._arena = self._new_arena(plan.slots, decoder.cache)
        self._tokens = np.zeros((plan.slots, 1), np.int64)
        self._lengths = np.full(plan.slots, self.sizes.prefix, np.int32)
        self._total_length = np.array([self.sizes.prefix + 1], np.int32)
        self._counts: dict[int, np.ndarray] = {}  # by candidates: keeps bound arrays alive
        self._steps: dict[tuple[int, int], _Step] = {}  # by rows and candidates
        encode_on = Placement(
            plan.encoder_provider, plan.encoder_threads, folder,
            exact=plan.combination == EXACT, cuda=CudaOptions(graphs=False),
            batch=plan.encode_batch, row=self.sizes.pixels,
        )  # fmt: skip
        decode_on = Placement(plan.decoder_provider, plan.decoder_threads)
        streams = min(plan.encoder_streams, plan.slots)
        self._encoder = Encoder(folder / encoder.file, encode_on, streams, self._image_names)
        self._decoder = open_session(folder / decoder.file, decode_on, self._inputs(1, 1))

    def _new_arena(self, slots: int, dtype: str) -> list[np.ndarray]:
        positions = self.sizes.prefix + self.text_tokens
        shape = (slots, self.sizes.heads, positions, self.sizes.head)
        return [np.zeros(shape, dtype) for _ in self._image_names]

    def _inputs(self, rows: int, candidates: int) -> dict[str, np.ndarray]:
        """The decoder's inputs for the leading rows: views of the buffers, not copies."""
        return {
            "token_ids": self._tokens[:rows],
            "lengths": self._lengths[:rows],
            "total_length": self._total_length,
            "candidates": self._counts.setdefault(candidates, np.array([candidates], np.int64)),
            **{
                name.replace("image", "past_key_values"): cache[:rows]
                for name, cache in zip(self._image_names, self._arena, strict=True)
            },
        }

    @property
    def runs_on(self) -> str:
        """For people: providers, precisions, and memory of the slots."""
        return self.plan.describe(sum(c.nbytes for c in self._arena))

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        """See ModelRunner. pixels: uint8, each of shape `Sizes.pixels`."""

        def put(index: int, image: list[np.ndarray]) -> None:
            for cache, values in zip(self._arena, image, strict=True):
                for slot in slots[index]:
                    cache[slot, :, : self.sizes.prefix] = values

        self._encoder.encode(pixels, put)

    def wait_encoded(self) -> None:
        """See ModelRunner; `encode` has waited."""

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
        searches: Sequence[Search] = (),
    ) -> Candidates:
        """See ModelRunner; one step only."""
        assert not (forced or searches), (
            "tokens are in host memory at every step: bursts gain nothing"
        )
        rows = len(tokens)
        self._tokens[:rows, 0] = tokens
        np.add(fed, self.sizes.prefix, out=self._lengths[:rows], casting="unsafe")
        self._total_length[0] = self._lengths[:rows].max() + 1
        step = self._steps.get((rows, candidates)) or self._bind(rows, candidates)
        self._decoder.run_with_iobinding(step.binding)
        return step.found

    def proceed(self, steps: int) -> Candidates:
        """See ModelRunner: not for one that waits."""
        raise NotImplementedError

    def bucket(self, rows: int) -> int:
        """See ModelRunner; a step works on exactly `rows` rows."""
        return rows

    def move(self, source: int, target: int) -> None:
        """See ModelRunner."""
        for cache in self._arena:
            cache[target] = cache[source]

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """See ModelRunner."""
        sources, targets = (list(slots) for slots in zip(*moves, strict=True))
        text = slice(self.sizes.prefix, self.sizes.prefix + fed)
        for cache in self._arena:
            cache[targets, :, text] = cache[sources, :, text]  # the right side is a copy

    def warm_up(self) -> None:
        """Run both graphs, so that compilation and allocation are done before the first request."""
        images = min(self.plan.encode_batch, len(self._tokens))
        for batch in {1, images}:
            self.encode([np.zeros(self.sizes.pixels, np.uint8)] * batch, leading(batch))
        self.decode([0], [0])

    def _bind(self, rows: int, candidates: int) -> _Step:
        binding = self._decoder.io_binding()
        ids, logprobs = (np.zeros((rows, candidates), kind) for kind in (np.int64, np.float32))
        best = np.zeros((rows, 1), np.float32)
        for name, array in (
            ("candidate_ids", ids),
            ("candidate_logprobs", logprobs),
            ("best_logits", best),
        ):
            binding.bind_ortvalue_output(name, _shared(array))
        for name, array in self._inputs(rows, candidates).items():
            value = _shared(array)
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_key_values"):
                present = name.replace("past_key_values", "present")
                binding.bind_ortvalue_output(present, value)
        step = _Step(binding, Candidates(ids[None], logprobs[None], best.T))
        self._steps[rows, candidates] = step
        return step


def _shared(array: np.ndarray) -> ort.OrtValue:
    """A CPU tensor over the array's memory: NumPy and the graph see each other's writes."""
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied a buffer it should share"
    return value
