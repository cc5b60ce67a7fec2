"""K/V of all slots on a device: for each layer a key and a value array `[slots + 1, heads, C, D]`.

C = prefix + text positions, D is the head size. The last slot is a sink for padding rows. Graphs
that copy see an array as pieces of PIECE int64, whatever its dtype.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.execution.device_buffer import DeviceBuffer, View
from runtime.execution.launch import Launch
from runtime.execution.stream import Stream
from runtime.model.manifest import PIECE, Sizes, kv_names
from runtime.providers.session import Placement, open_session


class Arena:
    """The arrays, and copies into them and within. Copies are queued, but for `reorder`."""

    def __init__(
        self,
        stream: Stream,
        sizes: Sizes,
        slots: int,
        text_tokens: int,
        dtype: Any,
        insert: tuple[Path, Placement],
        reorder: tuple[Path, Placement],
    ) -> None:
        """insert, reorder: graphs that `export.device_graphs` writes, and where they run."""
        self.slots, self.text_tokens, self._stream = slots, text_tokens, stream
        device = stream.device
        capacity = sizes.prefix + text_tokens
        slot = sizes.heads, capacity, sizes.head
        self.caches = {
            name: DeviceBuffer(device, (slots + 1, *slot), dtype) for name in kv_names(sizes.layers)
        }
        self._blank = DeviceBuffer(device, (1, *slot), dtype)
        vector = sizes.head * np.dtype(dtype).itemsize // (PIECE * 8)  # pieces of a K/V vector
        self.room = sizes.heads * capacity * vector  # pieces of a slot
        places = np.arange(self.room).reshape(sizes.heads, capacity, vector)
        # int64 [text positions, pieces]: where a slot's text is, by position.
        of_text = places[:, sizes.prefix :].transpose(1, 0, 2)
        self.text_places = np.ascontiguousarray(of_text).reshape(text_tokens, -1)
        self._image_places, self._slot_places = (
            _uploaded(stream, part.reshape(1, -1, 1))
            for part in (places[:, : sizes.prefix], places)
        )
        self._firsts = DeviceBuffer(device, (slots + 1, 1, 1), np.int64)
        self._insert, self._reorder = open_session(*insert), open_session(*reorder)
        self._inserts: dict[int, Launch] = {}

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return sum(cache.nbytes for cache in self.caches.values())

    def bind(self, binding: Any, rows: int) -> None:
        """Bind the leading rows as the decoder's past and present."""
        for name, cache in self.caches.items():
            cache.rows(rows).as_input(binding, f"past_key_values.{name}")
            cache.rows(rows).as_output(binding, f"present.{name}")

    def bind_pieces(self, binding: Any, output: str) -> None:
        """Bind the whole arena as a copying graph's `arena` and, in place, as `output`."""
        for name, cache in self.caches.items():
            pieces = cache.rows(self.slots + 1).shaped(-1, PIECE, dtype=np.int64)
            pieces.as_input(binding, f"arena.{name}")
            pieces.as_output(binding, f"{output}.{name}")

    def insert(self, images: Sequence[View], slots: Sequence[int]) -> None:
        """Copy image K/V, one view per array, to slots; images without a slot go to the sink."""
        rows = images[0].shape[0]
        if rows not in self._inserts:
            self._inserts[rows] = self._bind_copy(images, self._image_places)
        self._copy_to([*slots, *[self.slots] * (rows - len(slots))], self._inserts[rows])

    def move(self, source: int, target: int) -> None:
        """Copy a slot to another one."""
        sources = [cache.rows(1, source) for cache in self.caches.values()]
        self._copy_to([target], self._bind_copy(sources, self._slot_places))

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        blank = [self._blank.rows(1)] * len(self.caches)
        self._copy_to([slot], self._bind_copy(blank, self._slot_places))

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """See ModelRunner. It waits: `sources` and `targets` are freed."""
        places = self.text_places[:fed].reshape(-1)
        sources, targets = (
            np.add.outer(np.array(slots) * self.room, places).reshape(-1)
            for slots in zip(*moves, strict=True)
        )
        binding = self._reorder.io_binding()
        binding.bind_cpu_input("sources", sources)
        binding.bind_cpu_input("targets", targets[:, None])
        self.bind_pieces(binding, "reordered")
        self._reorder.run_with_iobinding(binding)

    def _bind_copy(self, sources: Sequence[View], places: DeviceBuffer) -> Launch:
        """Bind a copy of `sources` to `places` in the slots that `_firsts` names."""
        binding = self._insert.io_binding()
        count, rows = places.shape[1], sources[0].shape[0]
        places.rows(1).as_input(binding, "pieces")
        self._firsts.rows(rows).as_input(binding, "firsts")
        for name, source in zip(self.caches, sources, strict=True):
            source.shaped(rows, count, PIECE, dtype=np.int64).as_input(binding, f"image.{name}")
        self.bind_pieces(binding, "inserted")
        return Launch(self._insert, binding)

    def _copy_to(self, slots: Sequence[int], launch: Launch) -> None:
        firsts = np.zeros(self._firsts.shape, np.int64)
        firsts[: len(slots), 0, 0] = slots
        self._firsts.upload(firsts * self.room, self._stream)
        launch.run(graph=False)


def _uploaded(stream: Stream, array: np.ndarray) -> DeviceBuffer:
    buffer = DeviceBuffer(stream.device, array.shape, array.dtype)
    buffer.upload(array, stream)
    return buffer
