"""K/V of all slots on a device: a key and a value array per layer, `[slots + 2, heads, C, D]` each.

C = prefix + text positions, D is the head size. The last two slots are a sink, for padding rows,
and a blank one, which is never written. All arrays are one buffer, which graphs that copy see as
pieces of some int64, whatever its dtype: so a copy in all layers is one node.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.execution.device_buffer import DeviceBuffer, View
from runtime.execution.launch import Launch
from runtime.execution.stream import Stream
from runtime.model.manifest import Sizes, kv_names

# Most int64 of a piece, which a thread copies: 64 images into their slots take 465 us on an H200,
# with pieces of 2 or 8 562 and 487.
_PIECE = 4


class Arena:
    """The arrays, and copies into them and within. Copies are queued."""

    def __init__(
        self,
        stream: Stream,
        sizes: Sizes,
        slots: int,
        text_tokens: int,
        dtype: Any,
        graphs: Sequence[ort.InferenceSession],
        positions_first: bool,
    ) -> None:
        """graphs: for insertion and reordering, as `export.device_graphs` writes them.

        positions_first: whether image K/V are `[prefix, heads, D]`, not `[heads, prefix, D]`.
        """
        self.text_tokens, self._stream = text_tokens, stream
        self.sink, self.blank = slots, slots + 1
        self._names = kv_names(sizes.layers)
        capacity = sizes.prefix + text_tokens
        slot = sizes.heads, capacity, sizes.head
        self._in_array = slots + 2
        rows = len(self._names) * self._in_array
        self._buffer = DeviceBuffer(stream.device, (rows, *slot), dtype)
        words = sizes.head * np.dtype(dtype).itemsize // 8  # int64 of a K/V vector
        self._piece = gcd(words, _PIECE)
        vector = words // self._piece  # its pieces
        room = sizes.heads * capacity * vector  # pieces of a slot
        places = np.arange(room).reshape(sizes.heads, capacity, vector)
        # int64 [text positions, pieces]: where a slot's text is, by position.
        of_text = places[:, sizes.prefix :].transpose(1, 0, 2).reshape(text_tokens, -1)
        of_image = places[:, : sizes.prefix]
        if positions_first:
            of_image = of_image.swapaxes(0, 1)
        self._text, self._image, self._whole = (
            _uploaded(stream, part.reshape(-1, 1)) for part in (of_text, of_image, places)
        )
        self._at_position = of_text.shape[1]
        self._room = _uploaded(stream, np.array([room]))
        arrays = np.arange(len(self._names)) * self._in_array * room
        self._arrays = _uploaded(stream, arrays.reshape(-1, 1, 1, 1))
        self._sources, self._targets = (
            DeviceBuffer(stream.device, (slots + 2,), np.int64) for _ in range(2)
        )
        self._insert, self._reorder = graphs
        self._inserts: dict[int, Launch] = {}

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return self._buffer.nbytes

    def bind(self, binding: Any, rows: int) -> None:
        """Bind the leading rows as the decoder's past and present."""
        for array, name in enumerate(self._names):
            cache = self._buffer.rows(rows, array * self._in_array)
            cache.as_input(binding, f"past_key_values.{name}")
            cache.as_output(binding, f"present.{name}")

    def bind_text(self, binding: Any, positions: int) -> None:
        """Bind what a graph takes that reorders the leading text positions."""
        self._bind(binding, self._text.rows(positions * self._at_position), "reordered")

    def insert(self, images: View, slots: Sequence[int]) -> None:
        """Copy image K/V, `[arrays, B, ...]`, to B slots; images without a slot go to the sink."""
        rows = images.shape[1]
        if rows not in self._inserts:
            binding = self._insert.io_binding()
            self._targets.rows(rows).as_input(binding, "slots")
            shape = len(self._names), rows, len(self._image), self._piece
            pieces = images.shaped(*shape, dtype=np.int64)
            pieces.as_input(binding, "images")
            self._bind(binding, self._image.rows(len(self._image)), "inserted")
            self._inserts[rows] = Launch(self._insert, binding)
        targets = [*slots, *[self.sink] * (rows - len(slots))]
        self._targets.upload(np.array(targets), self._stream)
        self._inserts[rows].run()

    def move(self, source: int, target: int) -> None:
        """Copy a slot to another one."""
        self._copy([(source, target)], self._whole.rows(len(self._whole)))

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        self.move(self.blank, slot)

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """See ModelRunner; at most one move per slot."""
        self._copy(moves, self._text.rows(fed * self._at_position))

    def _copy(self, moves: Sequence[tuple[int, int]], places: View) -> None:
        binding = self._reorder.io_binding()
        for name, buffer, slots in zip(
            ("from", "to"), (self._sources, self._targets), zip(*moves, strict=True), strict=True
        ):
            buffer.upload(np.array(slots), self._stream)
            buffer.rows(len(moves)).as_input(binding, name)
        self._bind(binding, places, "reordered")
        Launch(self._reorder, binding).run()

    def _bind(self, binding: Any, places: View, output: str) -> None:
        """Bind the whole arena, in place, and the places to copy in each slot and array."""
        pieces = self._buffer.rows(len(self._buffer)).shaped(-1, self._piece, dtype=np.int64)
        pieces.as_input(binding, "arena")
        pieces.as_output(binding, output)
        self._room.rows(1).as_input(binding, "room")
        self._arrays.rows(len(self._names)).as_input(binding, "arrays")
        places.as_input(binding, "places")


def _uploaded(stream: Stream, array: np.ndarray) -> DeviceBuffer:
    buffer = DeviceBuffer(stream.device, array.shape, array.dtype)
    buffer.upload(array, stream)
    return buffer
