"""Decodes images for threads, in processes with the limits of the server's decoders."""

import asyncio

import numpy as np

from runtime.model.manifest import Manifest
from server.bulk.captioners.captioning import RunFailed
from server.bulk.captioners.loop_thread import LoopThread
from server.fairness.fair_queue import FairQueue
from server.images.decoder import PIXELS, PixelSlot, Setup, Target
from server.images.lane import DecodeTask, Lane, NoDecoder
from server.ipc.shared import PixelStore, RunFolder
from server.settings import Settings

# An engine's threads wait for each other, so it loses twice the time that decoders take from one.
# Decoders work ahead: the time that the engine leaves is enough for them.
_NICENESS = 19


class BulkDecoders:
    """Decoder processes for any number of threads."""

    def __init__(self, manifest: Manifest, processes: int, max_pixels: int) -> None:
        """max_pixels: the most that an image may have before it is resized.

        Raises NoSharedMemory.
        """
        limits, shape = Settings.model_fields, manifest.sizes.pixels
        self._seconds: float = limits["decode_seconds"].default
        memory = limits["decode_memory_mb"].default * 2**20
        self._folder = RunFolder()
        try:
            self._store = PixelStore(self._folder.path / "pixels", processes, shape, create=True)
        except BaseException:
            self._folder.remove()
            raise
        self._free = asyncio.Semaphore(processes)
        target = Target((self._store.path, processes, shape), manifest.preprocessing)
        setup = Setup((target,), max_pixels, memory, _NICENESS)
        self._loop = LoopThread("decoding")
        self._lane = self._loop.run(self._start(setup, processes))

    def pixels(self, image: bytes) -> np.ndarray:
        """An image's pixels for the encoder. Raises InvalidImage, TooManyPixels, TooHard, and
        RunFailed if no process starts.
        """
        try:
            return self._loop.run(self._decode(image))
        except NoDecoder as error:
            raise RunFailed(str(error)) from error

    def close(self) -> None:
        """End the processes."""
        try:
            self._loop.run(self._end())
        finally:
            self._loop.close()
            self._folder.remove()

    async def _start(self, setup: Setup, count: int) -> Lane:
        """Runs on the loop's thread: processes die with the thread that started them."""
        return Lane(setup, FairQueue(count))

    async def _decode(self, image: bytes) -> np.ndarray:
        async with self._free:
            slot = self._store.take()
            try:
                wall = 2 * self._seconds + 1
                task = DecodeTask(PIXELS, image, self._seconds, wall, PixelSlot(0, slot))
                await self._lane.ask("", task)
                return self._store[slot].copy()
            finally:
                self._store.give_back(slot)

    async def _end(self) -> None:
        self._lane.close()
