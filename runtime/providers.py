"""Execution providers by name, and sessions that are known to run on the one that was asked for.

ONNX Runtime by itself falls back to its CPU provider when another fails to load. Here that is an
error; what `auto` may step down to is the engine's business.
"""

import importlib
import importlib.util
import json
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort

from runtime.config import AUTO
from runtime.errors import EngineFolderError, ProviderError

log = logging.getLogger(__name__)

_OPENVINO_PACKAGE = "onnxruntime_ep_openvino"


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
            "TensorrtExecutionProvider",
            "install the gpu extra (onnxruntime-gpu) and TensorRT's libraries",
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
NAMES = (AUTO, *_PROVIDERS)  # after `auto`, the order in which it tries them


def available() -> tuple[str, ...]:
    """Names of the providers that this machine has, the fastest first.

    One whose installation is broken is left out with a log line.
    """
    found = []
    for provider in _PROVIDERS.values():
        try:
            if _is_there(provider):
                found.append(provider.name)
        except ProviderError as cause:
            log.warning("%s was left out: %s", provider.name, cause)
    return tuple(found)


def require(name: str) -> None:
    """Raise ProviderError, with the remedy, unless the named provider is here."""
    provider = _by_name(name)
    if not _is_there(provider):
        raise ProviderError(f"{provider.name} is not available here: {provider.remedy}")


def open_session(
    path: Path,
    name: str,
    threads: int,
    probe: dict[str, np.ndarray],
    compiled: Path | None = None,
    exact: bool = False,
) -> ort.InferenceSession:
    """Open a graph on the named provider.

    threads: of the operators; 0 takes all cores. probe: inputs to run it on once, because some
    providers open a graph that they then can't run. compiled: folder in which a provider that
    compiles graphs keeps the result for the next start. exact: compute in fp32 where the provider
    would take bf16 by itself. Raises ProviderError when the provider is
    missing, can't open or run the graph, or is not in use by the session afterwards.
    """
    require(name)
    provider = _by_name(name)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # The encoder's and the decoder's threads take turns: those of the one that rests must not spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        if provider.name == "openvino":
            session = _open_openvino(path, options, threads, compiled, exact)
        else:
            session = _open_builtin(path, provider, options)
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
        session.run(None, probe)
    except Exception as cause:
        raise ProviderError(f"{provider.name} can't run {path.name}: {cause}") from cause
    return session


def _by_name(name: str) -> Provider:
    if name not in _PROVIDERS:
        raise ProviderError(f"unknown provider {name!r}: use one of {', '.join(NAMES)}")
    return _PROVIDERS[name]


def _is_there(provider: Provider) -> bool:
    if provider.name == "openvino":
        return bool(_openvino_devices())
    return provider.ep in ort.get_available_providers()


def _open_builtin(
    path: Path, provider: Provider, options: ort.SessionOptions
) -> ort.InferenceSession:
    if provider.name != "cpu":
        ort.preload_dlls()  # CUDA and cuDNN from NVIDIA's wheels, where those are installed
    return ort.InferenceSession(str(path), options, providers=[provider.ep])


def _open_openvino(
    path: Path, options: ort.SessionOptions, threads: int, compiled: Path | None, exact: bool
) -> ort.InferenceSession:
    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    if threads:  # OpenVINO has threads of its own, which ONNX Runtime's setting does not reach
        config["INFERENCE_NUM_THREADS"] = threads
    if compiled is not None and os.access(compiled.parent, os.W_OK):
        config["CACHE_DIR"] = str(compiled)
    elif compiled is not None:
        log.info("%s can't be written to: the graph is compiled at every start", compiled.parent)
    options.add_provider_for_devices(
        _openvino_devices()[:1], {"load_config": json.dumps({"CPU": config})} if config else {}
    )
    return ort.InferenceSession(str(path), options)


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
