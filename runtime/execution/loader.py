"""From an engine folder to a runner: manifest, plan, memory and sessions."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtime.errors import GraphsFailed, ProviderError
from runtime.execution import self_test
from runtime.execution.device import DeviceRunner
from runtime.execution.host import HostRunner
from runtime.model import manifest as manifests
from runtime.model.manifest import Manifest
from runtime.planning.config import AUTO, MOST_SLOTS, SLOTS, EngineConfig
from runtime.planning.machine import memory
from runtime.planning.plan import Plan, resolve
from runtime.providers import cuda, registry
from runtime.providers.gpu import require_gpu
from runtime.providers.gpu_memory import Memory

log = logging.getLogger(__name__)

_DEVICE_CACHE = "float16"  # cache dtype of the DeviceRunner, on the CPU provider too
_MAX_MEMORY_SHARE = 0.8  # share of a machine's memory that the slots may take
_FP16_BYTES = 2
_ALLOCATOR_OVERHEAD = 2  # times that ONNX Runtime takes for tensors outside a session, at most
_ACTIVATION_TENSORS = 24  # per image in the encoder: live tensors of positions x width


@dataclass(frozen=True, slots=True)
class Prepared:
    """An engine with a checked folder, and plans to try in order. No session is open yet."""

    folder: Path
    manifest: Manifest
    config: EngineConfig
    plans: tuple[Plan, ...]


def prepare(folder: Path, config: EngineConfig) -> Prepared:
    """Check everything that can be checked before a graph is loaded; no slower than reading it.

    Raises EngineFolderError for a missing, damaged or foreign folder or plan, ProviderError for a
    missing provider or slots that don't fit memory.
    """
    if config.provider == AUTO:
        providers = registry.available()
    else:
        registry.require(config.provider)
        providers = (config.provider,)
    manifest = manifests.load(folder)
    plans = resolve(folder, manifest, config, providers)
    fitting: list[Plan] = []
    for plan in plans:
        try:
            fitting.append(_fitted(manifest, config, plan))
        except ProviderError as cause:
            if plan is plans[-1] and not fitting:
                raise
            log.warning("auto: %s was left out: %s", plan.encoder_provider, cause)
    return Prepared(folder, manifest, config, tuple(fitting))


def _fitted(manifest: Manifest, config: EngineConfig, plan: Plan) -> Plan:
    """The plan with its number of slots; ProviderError if they don't fit memory."""
    text = config.text_positions(manifest.sizes.text)
    plan = replace(plan, text_tokens=text, cuda_graphs=config.cuda_graphs)
    if plan.decoder_provider != "cuda":
        slots = config.slots or SLOTS
        most = int(_MAX_MEMORY_SHARE * config.memory_share * memory() / _slot_bytes(manifest, plan))
        if slots > most:
            raise ProviderError(
                f"{slots} slots do not fit the memory of {memory() / 2**30:.1f} GiB here: use "
                f"{most} (--slots) or fewer"
            )
        return replace(plan, slots=slots)
    gpu, needs = require_gpu(cuda.major()).shared(config.memory_share), gpu_memory(manifest, plan)
    batch = plan.encode_batch  # for which TensorRT compiles
    if not config.encode_batch and plan.encoder_provider == "cuda":
        batch = needs.batch(gpu, batch, config.slots)
    slots, limit = needs.budget(gpu, config.slots, MOST_SLOTS, batch)
    return replace(plan, slots=slots, encode_batch=batch, memory_limit=limit)


def _slot_bytes(manifest: Manifest, plan: Plan) -> int:
    """Bytes of one slot's K/V in host memory."""
    sizes, cache = manifest.sizes, manifest.combination(plan.combination).cache
    positions = sizes.prefix + plan.text_tokens
    return 2 * sizes.layers * sizes.heads * sizes.head * positions * np.dtype(cache).itemsize


def gpu_memory(manifest: Manifest, plan: Plan) -> Memory:
    """GPU memory of an engine: its weights, and the rest estimated from its shapes."""
    sizes, combination = manifest.sizes, manifest.combination(plan.combination)
    width = sizes.heads * sizes.head
    kv = 2 * sizes.layers * width * _FP16_BYTES  # per position
    graphs = (manifest.variant(graph, combination) for graph in ("encoder", "decoder"))
    return Memory(
        weights=sum(graph.weights for graph in graphs),
        slot=(sizes.prefix + plan.text_tokens) * kv * _ALLOCATOR_OVERHEAD,
        image=sizes.prefix * (kv * _ALLOCATOR_OVERHEAD + _ACTIVATION_TENSORS * width * _FP16_BYTES),
    )


AnyRunner = HostRunner | DeviceRunner


def open_runner(engine: Prepared) -> tuple[AnyRunner, float]:
    """Open and warm up the first plan that works here and passes the self-test.

    Returns the runner and the seconds per self-test caption. Each plan that fails is logged;
    raises ProviderError if the last one fails, too.
    """
    *optional, last = engine.plans
    for plan in optional:
        try:
            return _opened(engine, plan)
        except ProviderError as cause:
            _note("auto: %s was tried and left out: %s", plan.encoder_provider, cause)
    return _opened(engine, last)


def _note(message: str, *what: object) -> None:
    """Log a warning, without keeping an exception: its frames keep a runner, with its memory."""
    log.warning(message, *map(str, what))


def _opened(engine: Prepared, plan: Plan) -> tuple[AnyRunner, float]:
    manifest = engine.manifest
    runner = _warm_runner(engine, plan)
    if runner is None:  # a CUDA stream is unusable after a failed capture: open all sessions anew
        runner = _warm_runner(engine, replace(plan, cuda_graphs=False))
        assert runner is not None
    return runner, self_test.check(runner, manifest.sizes, manifest.tokens, manifest.self_test)


def _warm_runner(engine: Prepared, plan: Plan) -> AnyRunner | None:
    """Open and warm up a runner; None, with its memory freed, if CUDA graphs can't be captured.

    Raises ProviderError if the providers can't run the graphs.
    """
    cache = engine.manifest.combination(plan.combination).cache
    kind = DeviceRunner if cache == _DEVICE_CACHE else HostRunner
    runner: AnyRunner = kind(engine.folder, engine.manifest, plan)
    try:
        runner.warm_up()
    except GraphsFailed as cause:
        _note("%s: it goes on without CUDA graphs, and slower", cause)
        return None
    except Exception as cause:  # ONNX Runtime has one exception class per status code
        raise ProviderError(f"{plan.encoder_provider} can't run this: {cause}") from cause
    return runner
