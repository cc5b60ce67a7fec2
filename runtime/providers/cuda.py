"""CUDA in ONNX Runtime: libraries, provider options, and pinned memory."""

import ctypes
import importlib.util
import logging
import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import DeviceFailed, ProviderError

log = logging.getLogger(__name__)

EP = "CUDAExecutionProvider"
REMEDY = "install the gpu extra (onnxruntime-gpu) on a host with an NVIDIA driver"
_PINNED: list[np.ndarray] = []


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a session uses a GPU.

    memory_limit: most bytes to allocate. graphs: whether to capture runs as CUDA graphs. stream:
    the CUDA stream to run in; one of the session's own if None.
    """

    memory_limit: int | None = None
    graphs: bool = True
    stream: int | None = None


def major() -> int | None:
    """Major CUDA version that onnxruntime-gpu was built for; None for builds without CUDA."""
    major = ort.cuda_version.partition(".")[0]
    return int(major) if major.isdecimal() else None


@cache
def load() -> None:
    """Load CUDA's libraries from NVIDIA's wheels. Raises ProviderError naming a missing one."""
    # Attention of a decode step with heads of 64: on an H200, 256 rows take 0.81 ms a step without
    # this kernel and 1.08 with it, 8 rows 0.36 and 0.33. Read as a session is opened.
    os.environ.setdefault("ORT_ENABLE_XQA", "0")
    with redirect_stdout(sys.stderr):  # it prints what it does not find
        ort.preload_dlls()
    names = [f"{name}.so.{major()}" for name in ("libcublasLt", "libcublas", "libcudart")]
    for name in (*names, "libcurand.so.10", "libcudnn.so.9"):
        try:
            try:
                ctypes.CDLL(name)
            except OSError:
                ctypes.CDLL(_in_wheels(name), ctypes.RTLD_GLOBAL)
        except OSError as cause:
            raise ProviderError(
                f"CUDA's libraries can't be loaded ({cause}): install the gpu extra, which brings "
                "them, or a CUDA toolkit of that version"
            ) from cause


def _in_wheels(name: str) -> str:
    """Path of a library in NVIDIA's wheels, wherever they lie; ONNX Runtime looks for them only
    beside itself. The name as it is if there is none.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, (spec.submodule_search_locations or ()) if spec else ())
    return str(next((path for folder in folders for path in folder.rglob(name)), name))


def settings(how: CudaOptions, exact: bool) -> dict[str, str]:
    """The provider's options. exact: compute in fp32 throughout."""
    options = {
        "arena_extend_strategy": "kSameAsRequested",  # doubling would overshoot the limit
        "cudnn_conv_algo_search": "HEURISTIC",  # one convolution, not worth a search per batch size
        "enable_cuda_graph": str(int(how.graphs)),
        "use_tf32": str(int(not exact)),
    }
    if how.memory_limit is not None:
        options["gpu_mem_limit"] = str(how.memory_limit)
    if how.stream is not None:
        options["user_compute_stream"] = str(how.stream)
    return options


def call(function: str, *args: object, waits: bool = False) -> None:
    """Call a function of CUDA's runtime. Raises DeviceFailed.

    waits: whether the function waits for the device, so that other threads should run meanwhile.
    Getting Python's lock back from a busy thread takes longer than queueing work.
    """
    runtime = _runtime(ctypes.CDLL if waits else ctypes.PyDLL)
    if code := getattr(runtime, function)(*args):
        name = runtime.cudaGetErrorName(code).decode()
        raise DeviceFailed(f"CUDA's {function} says {name} ({code})")


@cache
def _runtime(kind: type[ctypes.CDLL]) -> ctypes.CDLL:
    try:
        runtime = kind(f"libcudart.so.{major()}")
    except OSError as cause:
        raise DeviceFailed(f"CUDA's runtime can't be loaded: {cause}") from cause
    runtime.cudaGetErrorName.restype = ctypes.c_char_p
    return runtime


def pin(array: np.ndarray) -> None:
    """Pin an array's memory, so that copies to a GPU read it directly (`cudaHostRegister`).

    The array is never freed, because its address stays registered with CUDA. If pinning fails,
    copies still work, but more slowly; a warning is logged.
    """
    try:
        call(
            "cudaHostRegister", ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes), ctypes.c_uint(0),
        )  # fmt: skip
    except DeviceFailed as cause:
        log.warning("copies to and from the GPU take pageable memory, which is slower: %s", cause)
    else:
        _PINNED.append(array)
