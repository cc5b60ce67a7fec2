"""Both graphs, the K/V arena, and the bindings between them. One thread uses a runner.

Arena: for each layer a key and a value array `[slots, heads, C, head]` with C = prefix + text
positions. A decode step binds the leading rows of these very arrays as past *and* present, so the
decoder graph appends each new token's K/V in place and no cache is copied from step to step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.execution.encoder import Encoder
from runtime.model.manifest import EXACT, Manifest
from runtime.planning.plan import Plan
from runtime.providers.cuda import CudaOptions
from runtime.providers.session import Placement, open_session


@dataclass(frozen=True, slots=True)
class _Step:
    """All that a decode step over a fixed number of rows needs, bound once."""

    binding: Any  # onnxruntime.IOBinding
    next_ids: np.ndarray


class HostRunner:
    """State in host memory: `encode` into slots, `decode` one token for rows."""

    burst = 1
    graphs = False
    on_gpu = False

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan) -> None:
        self.sizes, self.plan = manifest.sizes, plan
        self.text_tokens = plan.text_tokens
        combination = manifest.combination(plan.combination)
        encoder, decoder = (manifest.variant(g, combination) for g in ("encoder", "decoder"))
        self._image_names = [
            f"image.{layer}.{kind}"
            for layer in range(self.sizes.layers)
            for kind in ("key", "value")
        ]
        self._arena = self._new_arena(plan.slots, decoder.cache)
        self._tokens = np.zeros((plan.slots, 1), np.int64)
        self._lengths = np.full(plan.slots, self.sizes.prefix, np.int32)
        self._total_length = np.array([self.sizes.prefix + 1], np.int32)
        self._steps: dict[int, _Step] = {}
        encode_on = Placement(
            plan.encoder_provider, plan.encoder_threads, folder,
            exact=plan.combination == EXACT, cuda=CudaOptions(graphs=False),
            batch=plan.encode_batch, row=self.pixels_shape,
        )  # fmt: skip
        decode_on = Placement(plan.decoder_provider, plan.decoder_threads)
        streams = min(plan.encoder_streams, plan.slots)
        self._encoder = Encoder(folder / encoder.file, encode_on, streams, self._image_names)
        self._decoder = open_session(folder / decoder.file, decode_on, self._inputs(1))

    def _new_arena(self, slots: int, dtype: str) -> list[np.ndarray]:
        positions = self.sizes.prefix + self.text_tokens
        shape = (slots, self.sizes.heads, positions, self.sizes.head)
        return [np.zeros(shape, dtype) for _ in self._image_names]

    def _inputs(self, rows: int) -> dict[str, np.ndarray]:
        """The decoder's inputs for the leading rows: views of the buffers, not copies."""
        return {
            "token_ids": self._tokens[:rows],
            "lengths": self._lengths[:rows],
            "total_length": self._total_length,
            **{
                name.replace("image", "past_key_values"): cache[:rows]
                for name, cache in zip(self._image_names, self._arena, strict=True)
            },
        }

    @property
    def provider(self) -> str:
        """Of the encoder."""
        return self.plan.encoder_provider

    @property
    def precision(self) -> str:
        """The combination of the manifest."""
        return self.plan.combination

    @property
    def runs_on(self) -> str:
        """For people: providers and precisions, and the memory that the slots take."""
        return self.plan.describe(sum(c.nbytes for c in self._arena))

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        """Shape of one request's pixels."""
        return self.sizes.pixels

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[int]) -> None:
        """Put the image K/V of each of `pixels` (uint8, `pixels_shape`) into its slot."""

        def put(index: int, image: list[np.ndarray]) -> None:
            for cache, values in zip(self._arena, image, strict=True):
                cache[slots[index], :, : self.sizes.prefix] = values

        self._encoder.encode(pixels, put)

    def decode(
        self, tokens: Sequence[int], fed: Sequence[int], forced: Sequence[Sequence[int]] = ()
    ) -> np.ndarray:
        """Feed a token to each of the leading rows -> int64 `[1, rows]`, the most likely next ones.

        fed: text tokens that each row's cache holds already. Valid until the next call.
        """
        assert not forced, "tokens are in host memory at every step: bursts gain nothing"
        rows = len(tokens)
        self._tokens[:rows, 0] = tokens
        np.add(fed, self.sizes.prefix, out=self._lengths[:rows], casting="unsafe")
        self._total_length[0] = self._lengths[:rows].max() + 1
        step = self._steps.get(rows) or self._bind(rows)
        self._decoder.run_with_iobinding(step.binding)
        return step.next_ids[None]

    def bucket(self, rows: int) -> int:
        """Each row costs."""
        return rows

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from one slot to another."""
        for cache in self._arena:
            cache[target] = cache[source]

    def warm_up(self) -> None:
        """Run both graphs once, so that the first request finds them compiled and allocated."""
        images = min(self.plan.encode_batch, len(self._tokens))
        for batch in {1, images}:
            self.encode([np.zeros(self.pixels_shape, np.uint8)] * batch, range(batch))
        self.decode([0], [0])

    def _bind(self, rows: int) -> _Step:
        binding = self._decoder.io_binding()
        next_ids = np.zeros(rows, np.int64)
        binding.bind_ortvalue_output("next_ids", _shared(next_ids))
        for name, array in self._inputs(rows).items():
            value = _shared(array)
            binding.bind_ortvalue_input(name, value)
            if name.startswith("past_key_values"):
                present = name.replace("past_key_values", "present")
                binding.bind_ortvalue_output(present, value)
        step = _Step(binding, next_ids)
        self._steps[rows] = step
        return step


def _shared(array: np.ndarray) -> ort.OrtValue:
    """A CPU tensor over the array's own memory: the graph sees what numpy writes, and back."""
    value = ort.OrtValue.ortvalue_from_numpy(array)
    assert value.data_ptr() == array.ctypes.data, "ONNX Runtime copied a buffer it should share"
    return value
