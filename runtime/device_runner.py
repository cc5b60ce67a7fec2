"""Both graphs with all state on a device: arena, tokens and lengths. One thread uses a runner.

Everything has a fixed address, so that a step is a captured CUDA graph that is launched again:

* Rows come in buckets (1, 2, 4, ... slots). A step works on a whole bucket; what it does in rows
  that no sequence has is overwritten when one moves in.
* Step j of a burst reads row j of a ring of tokens and lengths and writes row j + 1, so the steps
  follow one another without the host, which uploads row 0 and fetches the others at the end.
* The encoder writes image K/V beside the arena; a small graph copies them into their slots.

It runs on the CPU provider as well, which is how it is tested without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.config import EngineConfig
from runtime.errors import ProviderError
from runtime.gpu import pin
from runtime.manifest import NOT_A_TOKEN, Manifest
from runtime.plan import Plan
from runtime.providers import CudaOptions, Placement, cuda_major, open_session

BURST = 4  # most steps between two fetches: a row that ends in the first wastes three


def buckets(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`: sizes that graphs are captured for."""
    powers = [1 << n for n in range(most.bit_length())]
    return (*(p for p in powers if p < most), most)


def bucket(rows: int, sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that holds `rows`."""
    return next(size for size in sizes if size >= rows)


class DeviceBuffer:
    """A tensor on a device whose leading rows, or any run of rows, can be bound to a graph."""

    def __init__(self, device: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Zeroed, because what a graph masks out must still be a number."""
        self.shape, self.dtype, self._device = shape, np.dtype(dtype), device
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
        self._value.update_inplace(np.zeros(shape, dtype))
        self._row_bytes = prod(shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return self.shape[0] * self._row_bytes

    def upload(self, array: np.ndarray) -> None:
        """Overwrite all of it; `array` has its shape."""
        self._value.update_inplace(array)

    def fetch(self) -> np.ndarray:
        """A copy in host memory."""
        return np.array(self._value.numpy())

    def as_input(
        self, binding: Any, name: str, rows: int, first: int = 0, column: bool = False
    ) -> None:
        """Let a graph read `rows` rows from row `first` on; `column`: as `[rows, 1]`."""
        shape, pointer = self._place(rows, first)
        shape = [rows, 1] if column else shape
        binding.bind_input(name, self._device, 0, self.dtype, shape, pointer)

    def as_output(self, binding: Any, name: str, rows: int, first: int = 0) -> None:
        """Let a graph write `rows` rows from row `first` on."""
        place = self._place(rows, first)
        binding.bind_output(name, self._device, 0, self.dtype, *place)

    def _place(self, rows: int, first: int) -> tuple[list[int], int]:
        return [rows, *self.shape[1:]], self._value.data_ptr() + first * self._row_bytes


@dataclass(frozen=True, slots=True)
class _Launch:
    """A session, what is bound to it, and the id of the CUDA graph that is captured of both."""

    session: ort.InferenceSession
    binding: Any
    options: Any
    waiting_options: Any

    @classmethod
    def of(cls, session: ort.InferenceSession, binding: Any, graph_id: int) -> "_Launch":
        return cls(session, binding, _run_options(graph_id, False), _run_options(graph_id, True))

    def run(self, wait: bool = True) -> None:
        """Run it; `wait` until the device has finished, or leave it running."""
        options = self.waiting_options if wait else self.options
        self.session.run_with_iobinding(self.binding, options)


def _run_options(graph_id: int, wait: bool) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not wait)))
    return options


_NO_GRAPH = -1  # not to be captured


class DeviceRunner:
    """Phases of captioning on a device: `encode` into slots, `decode` a burst of tokens."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        config: EngineConfig,
        plan: Plan,
        memory_limit: int | None = None,
    ) -> None:
        """memory_limit: bytes that both sessions may take on the device together."""
        assert config.slots is not None
        self.sizes, self.plan, self.burst = manifest.sizes, plan, BURST
        self._device = device = "cpu" if plan.decoder_provider == "cpu" else "cuda"
        self.text_tokens = config.text_positions(self.sizes.text)
        self._slots, self._batch = config.slots, min(plan.encode_batch, config.slots)
        self._buckets, self._batches = buckets(self._slots), buckets(self._batch)
        self._names = [f"{i}.{kind}" for i in range(self.sizes.layers) for kind in ("key", "value")]
        combination = manifest.combination(plan.combination)
        graphs = {g: manifest.variant(g, combination) for g in ("encoder", "decoder", "insert")}
        cache = np.dtype(graphs["decoder"].cache)
        heads, head, prefix = self.sizes.heads, self.sizes.head, self.sizes.prefix
        capacity = prefix + self.text_tokens
        slot, image = (heads, capacity, head), (heads, prefix, head)
        self._arena = [DeviceBuffer(device, (self._slots, *slot), cache) for _ in self._names]
        self._images = [DeviceBuffer(device, (self._batch, *image), cache) for _ in self._names]
        self._blank = DeviceBuffer(device, (1, *slot), cache)
        self._ring = BURST + 1, self._slots
        self._tokens = DeviceBuffer(device, (prod(self._ring),), np.int64)
        self._lengths = DeviceBuffer(device, (prod(self._ring),), np.int32)
        self._host_tokens = np.zeros(self._ring, np.int64)
        self._host_lengths = np.zeros(self._ring, np.int32)
        self._capacity = ort.OrtValue.ortvalue_from_numpy(np.array([capacity], np.int32))
        self._image_places, self._slot_places = _places(heads, prefix), _places(heads, capacity)
        self._pixels = {
            rows: DeviceBuffer(device, (rows, *self.pixels_shape), np.uint8)
            for rows in self._batches
        }
        self._staging = np.zeros((self._batch, *self.pixels_shape), np.uint8)
        if device == "cuda":
            pin(self._staging, cuda_major() or 0)
        half = None if memory_limit is None else memory_limit // 2
        captured, not_captured = CudaOptions(half, config.cuda_graphs), CudaOptions(half, False)
        encode_on = Placement(
            plan.encoder_provider, plan.encoder_threads, folder, cuda=captured, batch=self._batch,
            row=self.pixels_shape,
        )  # fmt: skip
        decode_on = Placement(plan.decoder_provider, plan.decoder_threads, cuda=captured)
        self._encoder = open_session(folder / graphs["encoder"].file, encode_on)
        self._decoder = open_session(folder / graphs["decoder"].file, decode_on)
        self._insert = open_session(
            folder / graphs["insert"].file, replace(decode_on, cuda=not_captured)
        )
        self._encodes: dict[int, _Launch] = {}
        self._steps: dict[tuple[int, int], _Launch] = {}

    @property
    def provider(self) -> str:
        """Of the encoder."""
        return self.plan.encoder_provider

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one; else it is the processor."""
        return self._device != "cpu"

    @property
    def precision(self) -> str:
        """The combination of the manifest."""
        return self.plan.combination

    @property
    def runs_on(self) -> str:
        """For people: providers and precisions, and the memory that the slots take."""
        arena = sum(cache.nbytes for cache in self._arena)
        return f"{self.plan.describe(self._slots, arena)} on the device"

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        """Shape of one request's pixels."""
        return self.sizes.pixels

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[int]) -> None:
        """Put the image K/V of each of `pixels` (uint8, at most the plan's batch) into its slot."""
        rows = bucket(len(pixels), self._batches)
        for row, image in enumerate(pixels):
            self._staging[row] = image
        self._pixels[rows].upload(self._staging[:rows])
        (self._encodes.get(rows) or self._bind_encode(rows)).run()
        places = np.array(slots, np.int64)
        self._copy(self._images, 0, len(pixels), self._image_places, places)

    def decode(self, tokens: Sequence[int], fed: Sequence[int], steps: int = 1) -> np.ndarray:
        """Feed a token to each leading row, then what was predicted, `steps` times in all.

        fed: text tokens that each row's cache holds already. Returns int64 `[steps, rows]`.
        """
        rows = len(tokens)
        size = bucket(rows, self._buckets)
        self._host_tokens[0, :rows] = tokens
        self._host_lengths[0, :rows] = np.add(fed, self.sizes.prefix)
        self._host_lengths[0, rows:] = self.sizes.prefix  # rows of nobody
        self._tokens.upload(self._host_tokens.reshape(-1))
        self._lengths.upload(self._host_lengths.reshape(-1))
        for step in range(steps):
            launch = self._steps.get((size, step)) or self._bind_step(size, step)
            launch.run(wait=step == steps - 1)
        predicted = self._tokens.fetch().reshape(self._ring)[1 : steps + 1, :rows]
        for row in np.flatnonzero((predicted == NOT_A_TOKEN).any(axis=0)):
            self._clear(int(row))
        return predicted

    def _clear(self, slot: int) -> None:
        """Empty a slot whose numbers broke down: a kernel may multiply what it masks by zero, and
        zero times NaN is NaN for the next sequence there."""
        blank = [self._blank] * len(self._names)
        self._copy(blank, 0, 1, self._slot_places, np.array([slot], np.int64))

    def bucket(self, rows: int) -> int:
        """Steps are captured for a few numbers of rows."""
        return bucket(rows, self._buckets)

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from one slot to another, on the device."""
        self._copy(self._arena, source, 1, self._slot_places, np.array([target], np.int64))

    def warm_up(self) -> None:
        """Run, and with CUDA graphs capture, everything that a request can meet.

        Raises ProviderError if the device can't.
        """
        try:
            self._warm_up()
        except Exception as cause:  # ONNX Runtime raises a class of its own for every status code
            raise ProviderError(f"{self.plan.encoder_provider} can't run this: {cause}") from cause

    def _warm_up(self) -> None:
        blank = np.zeros(self.pixels_shape, np.uint8)
        for batch in self._batches:
            self.encode([blank] * batch, range(batch))
        for size in self._buckets:
            self.decode([0] * size, [0] * size, min(self.burst, self.text_tokens))

    def _bind_encode(self, rows: int) -> _Launch:
        binding = self._encoder.io_binding()
        self._pixels[rows].as_input(binding, "pixels", rows)
        for name, image in zip(self._names, self._images, strict=True):
            image.as_output(binding, f"image.{name}", rows)
        launch = _Launch.of(self._encoder, binding, self._batches.index(rows) + 1)
        self._encodes[rows] = launch
        return launch

    def _bind_step(self, rows: int, step: int) -> _Launch:
        binding = self._decoder.io_binding()
        now, then = step * self._slots, (step + 1) * self._slots
        self._tokens.as_input(binding, "token_ids", rows, now, column=True)
        self._lengths.as_input(binding, "lengths", rows, now)
        self._tokens.as_output(binding, "next_ids", rows, then)
        self._lengths.as_output(binding, "next_lengths", rows, then)
        # The value is fixed in a captured graph; kernels go by each row's own length.
        binding.bind_ortvalue_input("total_length", self._capacity)
        for name, cache in zip(self._names, self._arena, strict=True):
            cache.as_input(binding, f"past_key_values.{name}", rows)
            cache.as_output(binding, f"present.{name}", rows)
        launch = _Launch.of(
            self._decoder, binding, 1 + step * len(self._buckets) + self._buckets.index(rows)
        )
        self._steps[rows, step] = launch
        return launch

    def _copy(
        self,
        source: list[DeviceBuffer],
        first: int,
        rows: int,
        places: np.ndarray,
        slots: np.ndarray,
    ) -> None:
        binding = self._insert.io_binding()
        binding.bind_cpu_input("positions", places)
        binding.bind_cpu_input("slots", slots.reshape(-1, 1, 1, 1))
        for name, images, cache in zip(self._names, source, self._arena, strict=True):
            images.as_input(binding, f"image.{name}", rows, first)
            cache.as_input(binding, f"arena.{name}", self._slots)
            cache.as_output(binding, f"inserted.{name}", self._slots)
        _Launch.of(self._insert, binding, _NO_GRAPH).run()


def _places(heads: int, positions: int) -> np.ndarray:
    """int64 `[1, H, P, 3]`: slot 0, head and position of each vector of a slot's first P."""
    head, position = np.meshgrid(np.arange(heads), np.arange(positions), indexing="ij")
    return np.stack([np.zeros_like(head), head, position], axis=-1)[None].astype(np.int64)
