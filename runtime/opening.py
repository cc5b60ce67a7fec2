"""From an engine folder to a runner: manifest, plan, sessions, each checked before the next."""

import logging
from dataclasses import dataclass
from pathlib import Path

from runtime import manifest as manifests
from runtime import providers
from runtime.config import AUTO, EngineConfig
from runtime.errors import ProviderError
from runtime.manifest import Manifest
from runtime.plan import Plan, resolve
from runtime.runner import Runner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An engine that was found whole, with the plans to try in their order. Nothing runs yet."""

    folder: Path
    manifest: Manifest
    config: EngineConfig
    plans: tuple[Plan, ...]


def prepare(folder: Path, config: EngineConfig) -> Prepared:
    """Find out all that can be wrong before a graph is loaded; takes no more than reading it.

    Raises EngineFolderError for a missing, damaged or foreign folder or plan, ProviderError for a
    provider that is not here.
    """
    if config.provider != AUTO:
        providers.require(config.provider)
    manifest = manifests.load(folder)
    plans = resolve(folder, manifest, config, providers.available())
    return Prepared(folder, manifest, config, tuple(plans))


def open_runner(engine: Prepared) -> Runner:
    """A runner on the first plan that works here; with several, each that doesn't is logged.

    Raises ProviderError when the last can't run either.
    """
    *optional, last = engine.plans
    for plan in optional:
        try:
            return Runner(engine.folder, engine.manifest, engine.config, plan)
        except ProviderError as cause:
            log.warning("auto: %s was tried and left out: %s", plan.encoder_provider, cause)
    return Runner(engine.folder, engine.manifest, engine.config, last)
