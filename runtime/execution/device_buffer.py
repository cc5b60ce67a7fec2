"""Tensors at fixed device addresses, and views of them to bind to graphs."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort

from runtime.execution.stream import Stream
from runtime.providers import cuda


@dataclass(frozen=True, slots=True)
class View:
    """Consecutive rows of a buffer, with the shape and type to bind."""

    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pointer: int

    def shaped(self, *shape: int, dtype: Any = None) -> "View":
        """The same bytes in another shape (one length may be -1) or dtype."""
        dtype = np.dtype(dtype or self.dtype)
        elements = prod(self.shape) * self.dtype.itemsize // dtype.itemsize
        known = -prod(shape) if -1 in shape else 1
        whole = tuple(elements // known if n == -1 else n for n in shape)
        assert prod(whole) == elements
        return View(self.device, dtype, whole, self.pointer)

    def as_input(self, binding: Any, name: str) -> None:
        """Bind the view as a graph's input."""
        binding.bind_input(name, self.device, 0, self.dtype, self.shape, self.pointer)

    def as_output(self, binding: Any, name: str) -> None:
        """Bind the view as a graph's output."""
        binding.bind_output(name, self.device, 0, self.dtype, self.shape, self.pointer)


class DeviceBuffer:
    """A tensor on a device; any consecutive rows of its leading axis can be bound to a graph."""

    def __init__(self, device: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Allocate zeros: masked values must still be numbers, not NaN."""
        self.shape, self.dtype, self._device = shape, np.dtype(dtype), device
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, device, 0)
        self._value.update_inplace(np.zeros(shape, dtype))
        self._row_bytes = prod(shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size on the device."""
        return self.shape[0] * self._row_bytes

    def upload(self, array: np.ndarray, stream: Stream, first: int = 0) -> None:
        """Queue a copy of an array into as many rows, from row `first` on; see `Stream.copy`."""
        assert (array.shape[1:], array.dtype) == (self.shape[1:], self.dtype)
        assert first + len(array) <= len(self)
        stream.copy(array, self._value.data_ptr() + first * self._row_bytes)

    def repeat(self, first: int, count: int, stream: Stream) -> None:
        """Queue a copy of `count` rows, from row `first` on, into the leading ones."""
        source = self.rows(count, first)
        stream.copy_within(source.pointer, self._value.data_ptr(), count * self._row_bytes)

    def download(self, array: np.ndarray, stream: Stream) -> None:
        """Queue a copy of all of it to an array of its size; see `Stream.copy_back`."""
        assert (array.nbytes, array.dtype) == (self.nbytes, self.dtype)
        assert array.flags.c_contiguous
        stream.copy_back(self._value.data_ptr(), array)

    def take(self, other: "DeviceBuffer", stream: Stream) -> None:
        """Queue a copy of another buffer's leading rows, as many as there are here."""
        source = other.rows(len(self))
        assert source.shape == self.shape
        stream.copy_within(source.pointer, self._value.data_ptr(), self.nbytes)

    def __len__(self) -> int:
        return self.shape[0]

    def fetch(self) -> np.ndarray:
        """A copy in host memory, once the device has ended what is queued before."""
        return np.array(self._value.numpy())

    def rows(self, count: int, first: int = 0) -> View:
        """View of `count` rows, from row `first` on."""
        pointer = self._value.data_ptr() + first * self._row_bytes
        return View(self._device, self.dtype, (count, *self.shape[1:]), pointer)


def pinned(device: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros in host memory that copies to and from the device access directly."""
    array = np.zeros(shape, dtype)
    if device == "cuda":
        cuda.pin(array)
    return array
