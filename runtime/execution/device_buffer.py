"""Tensors at fixed addresses of a device, and the views of them that graphs are bound to."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort


@dataclass(frozen=True, slots=True)
class View:
    """A run of a buffer's rows, as a graph is to see it."""

    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pointer: int

    def shaped(self, *shape: int, dtype: Any = None) -> "View":
        """The same bytes in another shape, one length of which may be -1, or as another type."""
        dtype = np.dtype(dtype or self.dtype)
        elements = prod(self.shape) * self.dtype.itemsize // dtype.itemsize
        known = -prod(shape) if -1 in shape else 1
        whole = tuple(elements // known if n == -1 else n for n in shape)
        return View(self.device, dtype, whole, self.pointer)

    def as_input(self, binding: Any, name: str) -> None:
        """Let a graph read it."""
        binding.bind_input(name, self.device, 0, self.dtype, self.shape, self.pointer)

    def as_output(self, binding: Any, name: str) -> None:
        """Let a graph write it."""
        binding.bind_output(name, self.device, 0, self.dtype, self.shape, self.pointer)


class DeviceBuffer:
    """A tensor on a device, any run of whose leading axis can be bound to a graph."""

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

    def rows(self, count: int, first: int = 0) -> View:
        """`count` of its rows, from row `first` on."""
        pointer = self._value.data_ptr() + first * self._row_bytes
        return View(self._device, self.dtype, (count, *self.shape[1:]), pointer)
