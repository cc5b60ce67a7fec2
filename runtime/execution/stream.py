"""A queue of copies and graph runs on a device, which run in the order in which they were queued.

An engine has one. So its buffers need no lock on the device; the host waits before it overwrites
memory that a queued copy may still read, and for results.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from runtime.errors import DeviceFailed, ProviderError
from runtime.providers import cuda

_NON_BLOCKING, _NO_TIMING, _TO_DEVICE = 1, 2, 1  # of cudaStream*, cudaEvent* and cudaMemcpy*


class Mark(Protocol):
    """A place in a stream."""

    def set(self) -> None:
        """Move the mark behind all that has been queued."""

    def wait(self) -> None:
        """Return once the device has got to the mark; at once if it was never set."""


class Stream(Protocol):
    """A queue of work on `device`, "cpu" or "cuda". handle: CUDA's, None on the host."""

    device: str
    handle: int | None

    def copy(self, array: np.ndarray, pointer: int) -> None:
        """Queue a copy from the host. Pinned memory may change once a mark behind the copy is
        reached, other memory as soon as the call returns.
        """

    def mark(self) -> Mark:
        """A new mark."""


def open_stream(device: str) -> Stream:
    """A stream of the device "cpu" or "cuda". Raises ProviderError."""
    try:
        return CudaStream() if device == "cuda" else HostStream()
    except DeviceFailed as cause:
        raise ProviderError(f"cuda can't run here: {cause}") from cause


class HostStream:
    """Copies and runs of sessions on the host, which have ended when the call returns."""

    device = "cpu"
    handle: int | None = None

    def copy(self, array: np.ndarray, pointer: int) -> None:
        """See Stream."""
        source = np.ascontiguousarray(array)
        ctypes.memmove(pointer, source.ctypes.data, source.nbytes)

    def mark(self) -> Mark:
        """See Stream."""
        return _Reached()


class _Reached:
    def set(self) -> None:
        pass

    def wait(self) -> None:
        pass


class CudaStream:
    """A CUDA stream on the current GPU. Its methods, and its marks', raise DeviceFailed."""

    device = "cuda"

    def __init__(self) -> None:
        stream = ctypes.c_void_p()
        cuda.call("cudaStreamCreateWithFlags", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        self._stream = stream
        self.handle: int | None = stream.value

    def copy(self, array: np.ndarray, pointer: int) -> None:
        """See Stream."""
        source = np.ascontiguousarray(array)
        cuda.call(
            "cudaMemcpyAsync", ctypes.c_void_p(pointer), ctypes.c_void_p(source.ctypes.data),
            ctypes.c_size_t(source.nbytes), ctypes.c_int(_TO_DEVICE), self._stream,
        )  # fmt: skip

    def mark(self) -> Mark:
        """See Stream."""
        return _Event(self._stream)


class _Event:
    def __init__(self, stream: Any) -> None:
        self._stream, self._event = stream, ctypes.c_void_p()
        cuda.call("cudaEventCreateWithFlags", ctypes.byref(self._event), ctypes.c_uint(_NO_TIMING))

    def set(self) -> None:
        cuda.call("cudaEventRecord", self._event, self._stream)

    def wait(self) -> None:
        cuda.call("cudaEventSynchronize", self._event, waits=True)
