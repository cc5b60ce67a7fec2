"""The engine of a bulk run, in a process of its own, for any number of threads.

An image that crashes it twice, or in whose step it fails twice, fails alone.
"""

import asyncio
import atexit
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import InvalidRequest
from runtime.limits import Limits
from runtime.model import manifest as manifests
from runtime.model.tokenizer import CaptionTokenizer
from runtime.planning.config import most_slots
from runtime.request import GenerationRequest, RequestOutput
from runtime.results import join_outputs, make_caption
from server.bulk.captioners.captioning import RunFailed
from server.bulk.captioners.loop_thread import LoopThread
from server.bulk.inputs.items import ScoredCaption, UnfitItem, scored
from server.ipc.failures import EngineFailed, PoisonedImage
from server.models import ServedModel
from server.processes import worker
from server.processes.supervised_engine import SupervisedEngine
from server.settings import Settings

_WAITING = 64  # images that wait for a slot, at most
_STEP_SECONDS = 300.0  # an engine that is in one step for longer is replaced


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """How to run the engine of a folder. Equal to its copies in other processes.

    threads: of each graph; 0 for all cores. main: entry point of its worker.
    """

    folder: Path
    slots: int | None = None
    provider: str = "auto"
    precision: str = "auto"
    threads: int = 0
    main: Callable[..., Any] = worker.main

    @property
    def settings(self) -> Settings:
        """Settings of a server with such an engine, whatever the environment says."""
        return Settings.model_construct(
            slots=self.slots,
            provider=self.provider,
            precision=self.precision,
            threads=self.threads,
            step_seconds=_STEP_SECONDS,
            log_level="WARNING",
        )


class BulkEngine:
    """An engine in a supervised process.

    manifest: of its folder. facts: of its worker. identity: all that decides a caption.
    """

    def __init__(self, setup: EngineSetup, prompt: str | None, sampling: dict[str, Any]) -> None:
        """sampling: fields of SamplingParams.

        Raises VignetteError: EngineFolderError, NoSharedMemory, CannotStart, and InvalidRequest if
        the engine can't serve this prompt or sampling.
        """
        self.manifest = manifests.read(setup.folder)
        if self.manifest.sizes.frames:
            raise InvalidRequest(
                "a video model takes several frames a caption: send them to a server"
            )
        self._tokenizer, self._sampling = CaptionTokenizer(setup.folder, self.manifest), sampling
        settings = setup.settings
        room = settings.engine_config.text_positions(self.manifest.sizes.text)
        self._limits = Limits(self._tokenizer, room)
        self._limits.check(prompt, sampling)
        model = ServedModel(self.manifest.model, setup.folder, 1.0, self.manifest.fingerprint)
        places = most_slots(setup.slots) + _WAITING
        self._engine = SupervisedEngine(settings, model, setup.main, places)
        self._loop = LoopThread("engine")
        try:
            self._loop.run(self._engine.start())
            facts = self._engine.worker.facts
            assert facts is not None
            self.facts, self._limits.slots = facts, facts.slots
            self._limits.check(prompt, sampling)
        except BaseException:  # an interrupt, too
            self.close()
            raise
        atexit.register(self.close)

    @property
    def identity(self) -> dict[str, str]:
        """Everything that determines the captions: model, export and precision."""
        return {
            "model": self.manifest.model,
            "engine": self.facts.engine,
            "precision": self.facts.precision,
        }

    def caption(self, pixels: np.ndarray, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions. Raises VignetteError if this image can't be captioned, and
        RunFailed.
        """
        prompt_ids, params = self._limits.check(prompt, self._sampling)
        request = GenerationRequest(None, prompt_ids, params)
        try:
            output = self._loop.run(self._output(request, pixels))
        except PoisonedImage as error:
            raise UnfitItem("the engine failed on it twice, the second time alone") from error
        except EngineFailed as error:
            raise UnfitItem(str(error)) from error
        return scored(make_caption(request, join_outputs([output]), self._tokenizer))

    def close(self) -> None:
        """End the engine's process, also when this process exits without it."""
        atexit.unregister(self.close)
        try:
            self._loop.run(self._engine.close())
        finally:
            self._loop.close()

    async def _output(self, request: GenerationRequest, pixels: np.ndarray) -> RequestOutput:
        digest = hashlib.sha256(pixels.data).hexdigest()
        generating = asyncio.create_task(self._last(request, digest, pixels))
        losing = asyncio.create_task(self._engine.lost.wait())
        try:
            await asyncio.wait({generating, losing}, return_when=asyncio.FIRST_COMPLETED)
            if not generating.done():
                raise RunFailed(self._engine.failure)
            return generating.result()
        finally:
            generating.cancel()
            losing.cancel()

    async def _last(
        self, request: GenerationRequest, digest: str, pixels: np.ndarray
    ) -> RequestOutput:
        [output] = [each async for each in self._engine.generate(request, digest, pixels)]
        return output
