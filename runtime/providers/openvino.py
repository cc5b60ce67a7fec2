"""OpenVINO, an ONNX Runtime plugin for Intel processors."""

import importlib
import importlib.util
import json
import logging
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import onnxruntime as ort

from runtime.errors import ProviderError
from runtime.model.manifest import OPENVINO_CACHE

log = logging.getLogger(__name__)

EP = "OpenVINOExecutionProvider"
_PACKAGE = "onnxruntime_ep_openvino"
REMEDY = f"install {_PACKAGE.replace('_', '-')}; it serves Intel processors only"


def add_to(options: ort.SessionOptions, threads: int, folder: Path | None, exact: bool) -> None:
    """Add OpenVINO to a session's options. exact: compute in fp32; folder: for compiled graphs."""
    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
    if threads:  # ONNX Runtime's setting does not reach OpenVINO's own threads
        config["INFERENCE_NUM_THREADS"] = threads
    if folder is not None and os.access(folder, os.W_OK):
        config["CACHE_DIR"] = str(folder / OPENVINO_CACHE)
    elif folder is not None:
        log.info("%s can't be written to: the graph is compiled at every start", folder)
    options.add_provider_for_devices(
        devices()[:1], {"load_config": json.dumps({"CPU": config})} if config else {}
    )


@cache
def devices() -> list[ort.OrtEpDevice]:
    """CPU devices that the OpenVINO plugin offers; empty without the plugin or an Intel CPU.

    The plugin is registered once per process.
    """
    if importlib.util.find_spec(_PACKAGE) is None:
        return []
    try:
        plugin: ModuleType = importlib.import_module(_PACKAGE)
        ort.register_execution_provider_library("openvino", plugin.get_library_path())
        found = ort.get_ep_devices()
    except Exception as cause:  # a broken installation may raise anything
        raise ProviderError(f"openvino can't be loaded: {cause}") from cause
    return [
        device
        for device in found
        if device.ep_name == plugin.get_ep_name()
        and device.device.type == ort.OrtHardwareDeviceType.CPU
    ]
