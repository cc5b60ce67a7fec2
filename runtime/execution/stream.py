"""A queue of copies and graph runs on a device, which run in the order in which they were queued.

An engine has one for all its graphs, so that its buffers need no lock on the device, and another
for images on their way there. The host waits before it overwrites memory that a queued copy may
still read, and for results.
"""

import ctypes
from typing import Any, Protocol

import numpy as np

from runtime.errors import DeviceFailed, ProviderError
from runtime.providers import cuda

_NON_BLOCKING, _NO_TIMING = 1, 2  # of cudaStream* and cudaEvent*
_TO_DEVICE, _TO_HOST, _WITHIN_DEVICE = 1, 2, 3  # of cudaMemcpy*


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

    def copy_back(self, pointer: int, array: np.ndarray) -> None:
        """Queue a copy to the host, which has ended once a mark behind it is reached. Into memory
        that is not pinned, the call itself waits.
        """

    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """Queue a copy from one pointer on the device to another."""

    def after(self, mark: "Mark") -> None:
        """Queue a wait for a mark of another stream, as it is set now."""

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

    def copy_back(self, pointer: int, array: np.ndarray) -> None:
        """See Stream."""
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """See Stream."""
        ctypes.memmove(target, source, nbytes)

    def after(self, mark: Mark) -> None:
        """See Stream."""
        mark.wait()

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
        self._copy(source.ctypes.data, pointer, source.nbytes, _TO_DEVICE)

    def copy_back(self, pointer: int, array: np.ndarray) -> None:
        """See Stream."""
        self._copy(pointer, array.ctypes.data, array.nbytes, _TO_HOST)

    def copy_within(self, source: int, target: int, nbytes: int) -> None:
        """See Stream."""
        self._copy(source, target, nbytes, _WITHIN_DEVICE)

    def _copy(self, source: int, target: int, nbytes: int, kind: int) -> None:
        cuda.call(
            "cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes), ctypes.c_int(kind), self._stream,
        )  # fmt: skip

    def after(self, mark: Mark) -> None:
        """See Stream."""
        assert isinstance(mark, _Event)
        mark.hold(self._stream)

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

    def hold(self, stream: Any) -> None:
        """Let another stream wait."""
        cuda.call("cudaStreamWaitEvent", stream, self._event, ctypes.c_uint(0))
