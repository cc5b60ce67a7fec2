"""Execution providers by name, and sessions that are known to run on the one that was asked for.

ONNX Runtime by itself falls back to its CPU provider when another fails to load. Here that is an
error; what `auto` may step down to is the engine's business.
"""

import ctypes
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort

from runtime import tensorrt
from runtime.config import PROVIDERS
from runtime.errors import EngineFolderError, ProviderError
from runtime.gpu import Gpu, require_gpu
from runtime.machine import quota, this_machine
from runtime.manifest import sha256

log = logging.getLogger(__name__)

_OPENVINO_PACKAGE = "onnxruntime_ep_openvino"
_COMPILED = "compiled"  # OpenVINO's subfolder of an engine


@dataclass(frozen=True, slots=True)
class Provider:
    """`ep` is ONNX Runtime's own name; `remedy` tells what to do when it is not there."""

    name: str
    ep: str
    remedy: str


_PROVIDERS = {
    p.name: p
    for p in (
        Provider(
            "tensorrt",
            tensorrt.EP,
            tensorrt.REMEDY,
        ),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "install the gpu extra (onnxruntime-gpu) on a host with an NVIDIA driver",
        ),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            f"install {_OPENVINO_PACKAGE.replace('_', '-')}; it serves Intel processors only",
        ),
        Provider("cpu", "CPUExecutionProvider", "reinstall onnxruntime"),
    )
}
_NVIDIA = ("cuda", "tensorrt")


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """How a session uses a GPU: the most bytes it may take, and whether its runs are captured."""

    memory_limit: int | None = None
    graphs: bool = True


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a graph runs, and how.

    threads: of the operators on a processor; 0 takes all cores.
    folder: where a provider that compiles graphs may keep the result for the next start.
    exact: compute in fp32 where the provider would take less by itself.
    batch, row: most rows of an encoder and the shape of each, which TensorRT compiles for.
    """

    provider: str
    threads: int = 0
    folder: Path | None = None
    exact: bool = False
    cuda: CudaOptions = CudaOptions()
    batch: int = 1
    row: tuple[int, ...] = ()


def available() -> tuple[str, ...]:
    """Names of the providers that this machine has, the fastest first.

    One whose installation is broken is left out with a log line.
    """
    found = []
    for provider in _PROVIDERS.values():
        try:
            if _is_installed(provider):
                require(provider.name)
                found.append(provider.name)
        except ProviderError as cause:
            log.warning("auto: %s was left out: %s", provider.name, cause)
    return tuple(found)


def require(name: str) -> None:
    """Raise ProviderError, with the remedy, unless the named provider can run here."""
    provider = _by_name(name)
    if not _is_installed(provider):
        raise ProviderError(f"{provider.name} is not available here: {provider.remedy}")
    if name in _NVIDIA:
        require_gpu(cuda_major())
        _load_cuda()
    if name == "tensorrt":
        tensorrt.version()


def cuda_major() -> int | None:
    """The CUDA that onnxruntime-gpu was built for; None for builds without."""
    major = ort.cuda_version.partition(".")[0]
    return int(major) if major.isdecimal() else None


def open_session(
    path: Path, how: Placement, probe: dict[str, np.ndarray] | None = None
) -> ort.InferenceSession:
    """Open a graph on a provider.

    probe: inputs to run it on once, because some providers open a graph that they then can't run.
    Raises ProviderError when the provider is missing, can't open or run the graph, or is not in use
    by the session afterwards.
    """
    require(how.provider)
    provider = _by_name(how.provider)
    options = session_options(how)
    try:
        if provider.name == "openvino":
            session = _open_openvino(path, options, how)
        elif provider.name == "tensorrt":
            session = _open_tensorrt(path, options, how)
        else:
            settings = _cuda_options(how) if provider.name == "cuda" else {}
            session = _session(path, options, [(provider.ep, settings)])
    except Exception as cause:  # ONNX Runtime raises a class of its own for every status code
        if provider.name == "cpu":
            raise EngineFolderError(f"{path} can't be loaded: export the engine again") from cause
        raise ProviderError(f"{provider.name} can't open {path.name}: {cause}") from cause
    if provider.ep not in session.get_providers():
        raise ProviderError(
            f"{provider.name} was asked for, but the session fell back to "
            f"{', '.join(session.get_providers())}: {provider.remedy}"
        )
    try:
        if probe is not None:
            session.run(None, probe)
    except Exception as cause:
        raise ProviderError(f"{provider.name} can't run {path.name}: {cause}") from cause
    return session


def session_options(how: Placement) -> ort.SessionOptions:
    """ONNX Runtime's settings for a graph, whatever provider it runs on."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # warnings are of shapes left on the processor, and the like
    options.intra_op_num_threads = how.threads or (quota() and this_machine().cores)
    # The encoder's and the decoder's threads take turns: those of the one that rests must not spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if how.provider == "cpu":
        # The CPU's kernel for both in one is ten times as slow as an addition and a normalisation.
        slower = "SkipLayerNormFusion"
        options.add_session_config_entry("optimization.disable_specified_optimizers", slower)
    return options


def _by_name(name: str) -> Provider:
    if name not in _PROVIDERS:
        raise ProviderError(f"unknown provider {name!r}: use one of {', '.join(PROVIDERS)}")
    return _PROVIDERS[name]


def _is_installed(provider: Provider) -> bool:
    if provider.name == "openvino":
        return bool(_openvino_devices())
    return provider.ep in ort.get_available_providers()


@cache
def _load_cuda() -> None:
    """Load CUDA's libraries from NVIDIA's wheels, so that one that is missing is told by name."""
    ort.preload_dlls()
    names = [f"{name}.so.{cuda_major()}" for name in ("libcublasLt", "libcublas", "libcudart")]
    for name in (*names, "libcurand.so.10", "libcudnn.so.9"):
        try:
            ctypes.CDLL(name)
        except OSError as cause:
            raise ProviderError(
                f"CUDA's libraries can't be loaded ({cause}): install the gpu extra, which brings "
                "them, or a CUDA toolkit of that version"
            ) from cause


def _session(
    path: Path,
    options: ort.SessionOptions,
    chain: Sequence[tuple[str, dict[str, str]]] | None = None,
) -> ort.InferenceSession:
    """Without the retry on other providers, which would hide why the one that was named failed."""
    return ort.InferenceSession(str(path), options, chain, enable_fallback=False)


def _cuda_options(how: Placement) -> dict[str, str]:
    options = {
        "arena_extend_strategy": "kSameAsRequested",  # doubling would overshoot the limit
        "cudnn_conv_algo_search": "HEURISTIC",  # one convolution, not worth a search a batch size
        "enable_cuda_graph": str(int(how.cuda.graphs)),
        "use_tf32": str(int(not how.exact)),
    }
    if how.cuda.memory_limit is not None:
        options["gpu_mem_limit"] = str(how.cuda.memory_limit)
    return options


def _open_tensorrt(path: Path, options: ort.SessionOptions, how: Placement) -> ort.InferenceSession:
    gpu: Gpu = require_gpu(cuda_major())
    assert how.folder is not None
    name = tensorrt.key(gpu, tensorrt.version(), sha256(path))
    folder = tensorrt.cache_folder(how.folder, name)
    chain = [
        (tensorrt.EP, tensorrt.options(folder, how.row, how.batch)),
        # For what TensorRT leaves over, such as a cast of the pixels.
        (_PROVIDERS["cuda"].ep, _cuda_options(how) | {"enable_cuda_graph": "0"}),
    ]
    return tensorrt.open_cached(folder, lambda: _session(path, options, chain))


def _open_openvino(path: Path, options: ort.SessionOptions, how: Placement) -> ort.InferenceSession:
    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"} if how.exact else {}
    if how.threads:  # OpenVINO has threads of its own, which ONNX Runtime's setting does not reach
        config["INFERENCE_NUM_THREADS"] = how.threads
    if how.folder is not None and os.access(how.folder, os.W_OK):
        config["CACHE_DIR"] = str(how.folder / _COMPILED)
    elif how.folder is not None:
        log.info("%s can't be written to: the graph is compiled at every start", how.folder)
    options.add_provider_for_devices(
        _openvino_devices()[:1], {"load_config": json.dumps({"CPU": config})} if config else {}
    )
    return _session(path, options)


@cache
def _openvino_devices() -> list[ort.OrtEpDevice]:
    """CPU devices that the OpenVINO plugin offers; empty without the plugin or an Intel CPU.

    A plugin is registered once for each process.
    """
    if importlib.util.find_spec(_OPENVINO_PACKAGE) is None:
        return []
    try:
        plugin: ModuleType = importlib.import_module(_OPENVINO_PACKAGE)
        ort.register_execution_provider_library("openvino", plugin.get_library_path())
        devices = ort.get_ep_devices()
    except Exception as cause:  # whatever a broken installation raises
        raise ProviderError(f"openvino can't be loaded: {cause}") from cause
    return [
        device
        for device in devices
        if device.ep_name == plugin.get_ep_name()
        and device.device.type == ort.OrtHardwareDeviceType.CPU
    ]
