"""Captioning by an engine on this machine."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.engine import Engine
from runtime.planning.machine import this_machine
from server.bulk.captioning import RunFailed, UnfitItem
from server.bulk.decoding import BulkDecoders
from server.bulk.engine_process import EngineDied, EngineProcess, NoEngine
from server.bulk.items import ScoredCaption

log = logging.getLogger(__name__)


class TryingEngine:
    """An engine for any number of threads. After a failed step or a crash, each image concerned is
    tried again alone.
    """

    def __init__(
        self, open_engine: Callable[[], Engine], prompt: str | None, sampling: dict[str, Any]
    ) -> None:
        """sampling: fields of SamplingParams. Raises NoEngine."""
        self._engine = EngineProcess(open_engine, prompt, sampling)
        self.facts = self._engine.facts
        self._apart = _Apart()

    def say(self, pixels: np.ndarray, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions. Raises VignetteError if this image can't be captioned, and
        RunFailed.
        """
        try:
            with self._apart.together():
                return self._generate(pixels, prompt)
        except (EngineDied, RuntimeError) as error:
            log.warning("a step failed, its images are tried one by one: %s", error)
        try:
            with self._apart.alone():
                return self._generate(pixels, prompt)
        except (EngineDied, RuntimeError) as error:
            raise UnfitItem(f"captioning it failed, also alone: {error}") from error

    def _generate(self, pixels: np.ndarray, prompt: str | None) -> tuple[ScoredCaption, ...]:
        try:
            return self._engine.generate(pixels, prompt)
        except NoEngine as error:
            raise RunFailed(f"the engine ended, and can't be opened again: {error}") from error

    def close(self) -> None:
        """End the engine's process."""
        self._engine.close()


class LocalCaptioner:
    """Decodes and captions on this machine."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        prompt: str | None,
        sampling: dict[str, Any],
        max_pixels: int,
    ) -> None:
        """sampling: fields of SamplingParams. Raises NoEngine."""
        self._engine = TryingEngine(open_engine, prompt, sampling)
        facts = self._engine.facts
        self.identity, self.where = facts.identity, facts.runs_on
        self.at_once = 2 * facts.slots
        cores = this_machine().cores
        try:
            self._decoding = BulkDecoders(facts.preprocessing, facts.shape, cores, max_pixels)
        except BaseException:
            self._engine.close()
            raise

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions. Raises VignetteError if this image can't be captioned, and
        RunFailed.
        """
        return self._engine.say(self._decoding.pixels(image), prompt)

    def stop(self) -> None:
        """No-op: there are no retries to stop."""

    def close(self) -> None:
        """End all processes."""
        self._decoding.close()
        self._engine.close()


class _Apart:
    """A lock for many users together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = threading.Lock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run with others, once no user runs or waits to run alone."""
        with self._alone, self._changed:
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run alone, once the users that run together have ended."""
        with self._alone:
            with self._changed:
                self._changed.wait_for(lambda: not self._together)
            yield
