"""TensorRT for the encoder: libraries, provider options, and the cache of compiled graphs.

Compiling takes minutes and its result is valid for one kind of GPU, one version of TensorRT and one
graph, so each such combination has its own folder: `<engine>/tensorrt/<key>/`.
"""

import atexit
import ctypes
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from runtime.errors import ProviderError
from runtime.model.manifest import TENSORRT_CACHE
from runtime.providers.gpu import Gpu

log = logging.getLogger(__name__)

EP = "TensorrtExecutionProvider"
REMEDY = "install TensorRT 10 (`pip install -e '.[gpu,tensorrt]'`), or use --provider cuda"
_LIBRARY = "libnvinfer.so.10"  # the version onnxruntime-gpu is linked to, like its parser
_PARSER = "libnvonnxparser.so.10"
_PACKAGE = "tensorrt_libs"  # where NVIDIA's wheels put both
_COMPILED_GRAPHS = "*.engine"
Session = TypeVar("Session")


@cache
def version() -> str:
    """Load TensorRT's libraries and return their version, such as 10.16.1.

    Raises ProviderError, with the package to install, if they are missing.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folder = (
        Path(spec.submodule_search_locations[0])
        if spec and spec.submodule_search_locations
        else None
    )
    try:
        for name in (_LIBRARY, _PARSER):
            whole = str(folder / name) if folder and (folder / name).is_file() else name
            library = ctypes.CDLL(whole, mode=ctypes.RTLD_GLOBAL)
            if name == _LIBRARY:
                number = library.getInferLibVersion()
    except (OSError, AttributeError) as cause:
        raise ProviderError(f"TensorRT can't be loaded ({cause}): {REMEDY}") from cause
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def key(gpu: Gpu, tensorrt: str, graph_sha256: str) -> str:
    """Name of the cache folder for one kind of GPU, TensorRT version and graph."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    major, minor = gpu.compute
    return f"{name}-sm{major}{minor}-trt{tensorrt}-{graph_sha256[:12]}"


def cache_folder(engine: Path, name: str) -> Path:
    """Folder for compiled graphs; a temporary one, with a warning in the log, if unwritable."""
    folder = engine / TENSORRT_CACHE / name
    if any(folder.glob(_COMPILED_GRAPHS)) and not os.access(folder, os.W_OK):
        return folder  # read-only, with a compiled graph: nothing is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    temporary = Path(tempfile.mkdtemp(prefix="vignette-tensorrt-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    log.warning(
        "%s can't be written to: TensorRT compiles at every start. Make the engine folder "
        "writable, or compile once with `make export TARGET=tensorrt`", folder,
    )  # fmt: skip
    return temporary


def options(folder: Path, row: tuple[int, ...], batch: int, half: bool) -> dict[str, str]:
    """The provider's options: engine and timing cache, and the profile of `pixels`.

    row: shape of one row of `pixels`. batch: most rows. half: allow fp16. Switches are True, not 1
    as for CUDA.
    """
    shape = "x".join(map(str, row))
    return {
        "trt_fp16_enable": str(half),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": f"pixels:1x{shape}",
        "trt_profile_opt_shapes": f"pixels:{batch}x{shape}",
        "trt_profile_max_shapes": f"pixels:{batch}x{shape}",
        "trt_layer_norm_fp32_fallback": "True",
    }


def open_cached(folder: Path, open_session: Callable[[], Session]) -> Session:
    """Call `open_session`; if it fails with a cache in `folder`, clear the cache and retry.

    A truncated or foreign cache is thus rebuilt before anything is served.
    """
    had = any(folder.glob(_COMPILED_GRAPHS))
    if not had:
        log.info("TensorRT compiles the encoder into %s; this takes minutes, once", folder)
    try:
        return open_session()
    except Exception as cause:  # ONNX Runtime has one exception class per status code
        if not had or not os.access(folder, os.W_OK):
            raise
        log.warning("TensorRT can't use %s and compiles again: %s", folder, cause)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return open_session()
