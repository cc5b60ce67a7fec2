"""Decodes images for threads, in processes with the limits of the server's decoders."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import numpy as np

from runtime.model.manifest import Preprocessing
from server.images.decoder import PIXELS, Place, Setup, Target
from server.images.lane import DecodeTask, Lane
from server.ipc.shared import PixelStore, RunFolder
from server.settings import Settings

# An engine's threads wait for each other, so it loses twice the time that decoders take from one.
# Decoders work ahead: the time that the engine leaves is enough for them.
_NICENESS = 15
_Result = TypeVar("_Result")


class BulkDecoders:
    """Decoder processes for any number of threads."""

    def __init__(
        self, how: Preprocessing, shape: tuple[int, ...], processes: int, max_pixels: int
    ) -> None:
        """shape: of the decoded pixels. max_pixels: the most that an image may have before."""
        limits = Settings.model_fields
        self._seconds: float = limits["decode_seconds"].default
        memory = limits["decode_memory_mb"].default * 2**20
        self._folder = RunFolder()
        self._store = PixelStore(self._folder.path / "pixels", processes, shape, create=True)
        self._free = asyncio.Semaphore(processes)
        target = Target((self._store.path, processes, shape), how)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="decoding", daemon=True)
        self._thread.start()
        setup = Setup((target,), max_pixels, memory, _NICENESS)
        self._lane = self._on_loop(self._start(setup, processes))

    def pixels(self, image: bytes) -> np.ndarray:
        """An image's pixels for the encoder. Raises InvalidImage, TooManyPixels or TooHard."""
        return self._on_loop(self._decode(image))

    def close(self) -> None:
        """End the processes."""
        self._loop.call_soon_threadsafe(self._lane.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.remove()

    async def _start(self, setup: Setup, count: int) -> Lane:
        """Runs on the loop's thread: processes die with the thread that started them."""
        return Lane(setup, count)

    async def _decode(self, image: bytes) -> np.ndarray:
        async with self._free:
            slot = self._store.take()
            try:
                wall = 2 * self._seconds + 1
                task = DecodeTask(PIXELS, image, self._seconds, wall, Place(0, slot, -1))
                await self._lane.ask("", task)
                return self._store[slot].copy()
            finally:
                self._store.give_back(slot)

    def _on_loop(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
