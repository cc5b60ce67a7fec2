"""Sessions that are checked to run on the requested provider."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from runtime.errors import EngineFolderError, ProviderError
from runtime.model.manifest import sha256
from runtime.planning.machine import limited_cores, this_machine
from runtime.providers import cuda, openvino, tensorrt
from runtime.providers.cuda import CudaOptions
from runtime.providers.gpu import require_gpu
from runtime.providers.registry import by_name, require


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a graph runs, and how.

    threads: threads per operator on a CPU; 0 takes all cores.
    folder: engine folder, where a provider may cache compiled graphs for the next start.
    exact: compute in fp32 even where the provider defaults to less.
    half: let TensorRT compute in fp16, as the graph was proven so.
    batch, row: most rows of an encoder and the shape of each, for which TensorRT compiles.
    """

    provider: str
    threads: int = 0
    folder: Path | None = None
    exact: bool = False
    half: bool = False
    cuda: CudaOptions = CudaOptions()  # noqa: RUF009 - it is frozen
    batch: int = 1
    row: tuple[int, ...] = ()


def open_session(
    path: Path, how: Placement, probe: dict[str, np.ndarray] | None = None
) -> ort.InferenceSession:
    """Open a graph on a provider.

    probe: inputs for one test run, because some providers open graphs that they can't run. Raises
    ProviderError if the provider is missing, can't open or run the graph, or is not used by the
    session; EngineFolderError if the CPU provider can't open the graph.
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
    except Exception as cause:  # ONNX Runtime has one exception class per status code
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
    """ONNX Runtime's session options for any provider."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # omits warnings, such as of shape nodes left on the CPU
    ort.set_default_logger_severity(3)  # and kernels' own, such as of indices that may repeat
    # With 0, ONNX Runtime takes all physical cores of the host, whatever is this process's share.
    options.intra_op_num_threads = how.threads or limited_cores()
    # Encoder and decoder threads take turns: those of the idle session must not spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if how.provider == "cpu":
        # The CPU's fused kernel is ten times as slow as separate addition and normalisation.
        slower = "SkipLayerNormFusion"
        options.add_session_config_entry("optimization.disable_specified_optimizers", slower)
    if not this_machine().has_int8_dot:
        # On x86, products of uint8 and int8 saturate then: this makes the weights uint8. Where
        # there is an instruction, ONNX Runtime would not use it then.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _session(
    path: Path,
    options: ort.SessionOptions,
    chain: Sequence[tuple[str, dict[str, str]]] | None = None,
) -> ort.InferenceSession:
    """Open a session without provider fallback, which would hide the cause of a failure."""
    return ort.InferenceSession(str(path), options, chain, enable_fallback=False)


def _open_tensorrt(path: Path, options: ort.SessionOptions, how: Placement) -> ort.InferenceSession:
    gpu = require_gpu(cuda.major())
    assert how.folder is not None
    name = tensorrt.key(gpu, tensorrt.version(), sha256(path))
    folder = tensorrt.cache_folder(how.folder, name)
    chain = [
        (tensorrt.EP, tensorrt.options(folder, how.row, how.batch, how.half)),
        # For nodes that TensorRT leaves over, such as a cast of the pixels; in streams of ONNX
        # Runtime's own, which follow TensorRT's.
        (cuda.EP, cuda.settings(replace(how.cuda, graphs=False, stream=None), how.exact)),
    ]
    return tensorrt.open_cached(folder, lambda: _session(path, options, chain))
