"""Sessions that are known to run on the provider that was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import EngineFolderError, ProviderError
from runtime.model.manifest import sha256
from runtime.planning.machine import quota, this_machine
from runtime.providers import cuda, openvino, tensorrt
from runtime.providers.cuda import CudaOptions
from runtime.providers.gpu import require_gpu
from runtime.providers.registry import by_name, require


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
    cuda: CudaOptions = CudaOptions()  # noqa: RUF009 - it is frozen
    batch: int = 1
    row: tuple[int, ...] = ()


def open_session(
    path: Path, how: Placement, probe: dict[str, np.ndarray] | None = None
) -> ort.InferenceSession:
    """Open a graph on a provider.

    probe: inputs to run it on once, because some providers open a graph that they then can't run.
    Raises ProviderError when the provider is missing, can't open or run the graph, or is not in use
    by the session afterwards.
    """
    require(how.provider)
    provider = by_name(how.provider)
    options = session_options(how)
    try:
        if provider.name == "openvino":
            openvino.add_to(options, how.threads, how.folder, how.exact)
            session = _session(path, options)
        elif provider.name == "tensorrt":
            session = _open_tensorrt(path, options, how)
        else:
            settings = cuda.settings(how.cuda, how.exact) if provider.name == "cuda" else {}
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


def _session(
    path: Path,
    options: ort.SessionOptions,
    chain: Sequence[tuple[str, dict[str, str]]] | None = None,
) -> ort.InferenceSession:
    """Without the retry on other providers, which would hide why the one that was named failed."""
    return ort.InferenceSession(str(path), options, chain, enable_fallback=False)


def _open_tensorrt(path: Path, options: ort.SessionOptions, how: Placement) -> ort.InferenceSession:
    gpu = require_gpu(cuda.major())
    assert how.folder is not None
    name = tensorrt.key(gpu, tensorrt.version(), sha256(path))
    folder = tensorrt.cache_folder(how.folder, name)
    chain = [
        (tensorrt.EP, tensorrt.options(folder, how.row, how.batch)),
        # For what TensorRT leaves over, such as a cast of the pixels.
        (cuda.EP, cuda.settings(how.cuda, how.exact) | {"enable_cuda_graph": "0"}),
    ]
    return tensorrt.open_cached(folder, lambda: _session(path, options, chain))
