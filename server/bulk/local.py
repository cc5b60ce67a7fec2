"""An engine in this process, and decoder processes under the limits of the server's."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from runtime.engine import Engine
from runtime.errors import InvalidRequest, VignetteError
from runtime.planning.machine import this_machine
from server.bulk.captioning import Unfit
from server.bulk.items import Said, said_in
from server.images.decoder import PIXELS, Place, Setup, Target
from server.images.lane import Errand, Lane
from server.ipc.shared import PixelStore, RunFolder
from server.settings import Settings

log = logging.getLogger(__name__)


class LocalCaptioner:
    """Captions with an engine. A step that raises is repeated for each of its images alone."""

    def __init__(self, engine: Engine, sampling: dict[str, Any], max_pixels: int) -> None:
        """sampling: fields of SamplingParams. Raises InvalidRequest for a video model."""
        if engine.manifest.sizes.frames:
            raise InvalidRequest(
                "a video model takes several frames a caption: send them to a server"
            )
        self._engine, self._sampling = engine, sampling
        self.identity, self.where = engine.identity, engine.runs_on
        self.at_once = 2 * (engine.config.slots or 1)
        self._pixels = Pixels(engine, max_pixels, self.at_once)
        self._apart = _Apart()

    def caption(self, image: bytes, prompt: str | None) -> tuple[Said, ...]:
        """What is said of an image. Raises VignetteError for what is wrong with it."""
        pixels = self._pixels.of(image)
        try:
            with self._apart.together():
                return self._generate(pixels, prompt)
        except VignetteError:
            raise
        except Exception:  # ONNX Runtime raises a class of its own for every status code
            log.warning("a step failed: its images are tried one by one", exc_info=True)
        try:
            with self._apart.alone():
                return self._generate(pixels, prompt)
        except Exception as error:
            raise Unfit(str(error)) from error

    def _generate(self, pixels: np.ndarray, prompt: str | None) -> tuple[Said, ...]:
        return said_in(self._engine.generate([pixels], [prompt], **self._sampling)[0])

    def stop(self) -> None:
        """Nothing is done again that could be given up."""

    def close(self) -> None:
        """End its processes."""
        self._pixels.close()


class Pixels:
    """Images decoded for any number of threads, in as many processes as there are cores."""

    def __init__(self, engine: Engine, max_pixels: int, places: int) -> None:
        """places: images that wait or are decoded at a time."""
        limits, manifest = Settings.model_fields, engine.manifest
        self._seconds: float = limits["decode_seconds"].default
        memory = limits["decode_memory_mb"].default * 2**20
        self._folder = RunFolder()
        self._store = PixelStore(
            self._folder.path / "pixels", places, manifest.sizes.pixels, create=True
        )
        target = Target((self._store.path, places, self._store.shape), manifest.preprocessing)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="decoding", daemon=True)
        self._thread.start()
        self._lane = self._on_loop(self._start(Setup((target,), max_pixels, memory, 0)))

    def of(self, image: bytes) -> np.ndarray:
        """Pixels as the encoder takes them. Raises InvalidImage, TooManyPixels or TooHard."""
        return self._on_loop(self._decode(image))

    def close(self) -> None:
        """End the processes."""
        self._loop.call_soon_threadsafe(self._lane.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.remove()

    async def _start(self, setup: Setup) -> Lane:  # they die with the thread that started them
        cores = this_machine().cores
        return Lane(setup, cores).start(cores)

    async def _decode(self, image: bytes) -> np.ndarray:
        slot = self._store.take()
        try:
            wall = 2 * self._seconds + 1
            errand = Errand(PIXELS, image, self._seconds, wall, Place(0, slot, -1))
            await self._lane.ask("bulk", errand)
            return self._store[slot].copy()
        finally:
            self._store.give_back(slot)

    def _on_loop(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


class _Apart:
    """Many together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = threading.Lock()

    @contextmanager
    def together(self) -> Iterator[None]:
        """With others that are; not while one wants to be alone."""
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
        """Once those that are together have ended."""
        with self._alone:
            with self._changed:
                self._changed.wait_for(lambda: not self._together)
            yield
