"""From an engine folder to a runner: manifest, plan, memory and sessions, one after another."""

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

_ON_DEVICE = "float16"  # a cache of that type stays with the decoder, on a processor, too
_SHARE = 0.8  # of a machine's memory that the slots may take
_HALF = 2  # bytes
_ARENA = 2  # ONNX Runtime's allocator for tensors beside a session takes up to twice their size
_ACTIVATIONS = 24  # of an image in the encoder: tensors of positions x width that are alive at once


@dataclass(frozen=True, slots=True)
class Prepared:
    """An engine that was found whole, and plans to try in their order. Nothing runs yet."""

    folder: Path
    manifest: Manifest
    config: EngineConfig
    plans: tuple[Plan, ...]


def prepare(folder: Path, config: EngineConfig) -> Prepared:
    """Find out all that can be wrong before a graph is loaded; takes no more than reading it.

    Raises EngineFolderError for a missing, damaged or foreign folder or plan, ProviderError for a
    provider that is not here, or a GPU that is too small.
    """
    if config.provider != AUTO:
        registry.require(config.provider)
    manifest = manifests.load(folder)
    plans = resolve(folder, manifest, config, registry.available())
    fitting: list[Plan] = []
    for plan in plans:
        try:
            fitting.append(_fitted(manifest, config, plan))
        except ProviderError as cause:
            if len(plans) == 1:
                raise
            log.warning("auto: %s was left out: %s", plan.encoder_provider, cause)
    return Prepared(folder, manifest, config, tuple(fitting))


def _fitted(manifest: Manifest, config: EngineConfig, plan: Plan) -> Plan:
    """The plan with its slots; ProviderError if they don't fit the memory that holds them."""
    text = config.text_positions(manifest.sizes.text)
    plan = replace(plan, text_tokens=text, cuda_graphs=config.cuda_graphs)
    if plan.decoder_provider != "cuda":
        slots = config.slots or SLOTS
        most = int(_SHARE * config.memory_share * memory() / _slot_bytes(manifest, plan))
        if slots > most:
            raise ProviderError(
                f"{slots} slots do not fit the memory of {memory() / 2**30:.1f} GiB here: use "
                f"{most} (--slots) or fewer"
            )
        return replace(plan, slots=slots)
    gpu = require_gpu(cuda.major())
    slots, limit = gpu_memory(manifest, plan).budget(
        gpu.shared(config.memory_share), config.slots, MOST_SLOTS, plan.encode_batch
    )
    return replace(plan, slots=slots, memory_limit=limit)


def _slot_bytes(manifest: Manifest, plan: Plan) -> int:
    """Bytes of one slot's K/V on a processor."""
    sizes, cache = manifest.sizes, manifest.combination(plan.combination).cache
    positions = sizes.prefix + plan.text_tokens
    return 2 * sizes.layers * sizes.heads * sizes.head * positions * np.dtype(cache).itemsize


def gpu_memory(manifest: Manifest, plan: Plan) -> Memory:
    """What an engine takes of a GPU: its weights, the rest by its shapes."""
    sizes, combination = manifest.sizes, manifest.combination(plan.combination)
    width = sizes.heads * sizes.head
    kv = 2 * sizes.layers * width * _HALF  # of one position
    graphs = (manifest.variant(graph, combination) for graph in ("encoder", "decoder"))
    return Memory(
        weights=sum(graph.weights for graph in graphs),
        slot=(sizes.prefix + plan.text_tokens) * kv * _ARENA,
        image=sizes.prefix * (kv * _ARENA + _ACTIVATIONS * width * _HALF),
    )


AnyRunner = HostRunner | DeviceRunner


def open_runner(engine: Prepared) -> tuple[AnyRunner, float]:
    """A warm runner on the first plan that works here and passes the self-test; and the seconds
    that a caption of the self-test took.

    With several plans, each that doesn't work is logged. Raises ProviderError when the last can't
    run either.
    """
    *optional, last = engine.plans
    for plan in optional:
        try:
            return _opened(engine, plan)
        except ProviderError as cause:
            log.warning("auto: %s was tried and left out: %s", plan.encoder_provider, cause)
    return _opened(engine, last)


def _opened(engine: Prepared, plan: Plan) -> tuple[AnyRunner, float]:
    manifest = engine.manifest
    runner = _warm_runner(engine, plan)
    if runner is None:  # a stream that a capture failed on is of no use: all is opened again
        runner = _warm_runner(engine, replace(plan, cuda_graphs=False))
        assert runner is not None
    return runner, self_test.check(runner, manifest.sizes, manifest.tokens, manifest.self_test)


def _warm_runner(engine: Prepared, plan: Plan) -> AnyRunner | None:
    """None if CUDA graphs were asked for and can't be captured; what it held is free again."""
    cache = engine.manifest.combination(plan.combination).cache
    kind = DeviceRunner if cache == _ON_DEVICE else HostRunner
    runner: AnyRunner = kind(engine.folder, engine.manifest, plan)
    try:
        runner.warm_up()
    except GraphsFailed as cause:
        log.warning("%s: it goes on without CUDA graphs, and slower", cause)
        return None
    return runner
