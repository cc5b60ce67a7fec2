"""Decoding images in processes of their own, under limits on memory and time.

Image decoders are C code that is fed whatever strangers send. One that crashes, hangs or unpacks
to gigabytes takes its process with it and nothing else: the next image finds a new one.
"""

import asyncio
import logging
import math
import multiprocessing
import os
import queue
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runtime.errors import InvalidImage, TooManyPixels, VignetteError
from runtime.manifest import Preprocessing

log = logging.getLogger(__name__)

_ERRORS: dict[str, type[VignetteError]] = {
    "InvalidImage": InvalidImage,
    "TooManyPixels": TooManyPixels,
}
_WATCH_SECONDS = 0.1
_CONTEXT = multiprocessing.get_context("spawn")


class TooHard(VignetteError):
    """Decoding this image took too long, or too much memory."""


class Decoders:
    """A pool of decoder processes; each thread of it talks to one."""

    def __init__(
        self,
        count: int,
        store: tuple[Path, int, tuple[int, ...]],
        how: Preprocessing,
        max_pixels: int,
        seconds: float,
        memory: int,
    ) -> None:
        """store: path, slots and shape of the PixelStore that they write to.

        seconds: for one image. memory: bytes of address space that a process may use.
        """
        self._arguments = (store, how, max_pixels, memory)
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Decoder] = queue.SimpleQueue()
        self._all: set[_Decoder] = set()
        for _ in range(count):
            self._idle.put(self._new())
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="decoders", daemon=True).start()

    def _watch(self) -> None:
        """Kill what is late: whoever waits for it, to send or to hear, then finds it gone."""
        while not self._closed.wait(_WATCH_SECONDS):
            for decoder in list(self._all):
                if time.monotonic() > decoder.due:
                    decoder.process.kill()

    def _new(self) -> "_Decoder":
        decoder = _Decoder(self._arguments)
        self._all.add(decoder)
        return decoder

    async def decode(self, image: bytes, slot: int, frame: int | None) -> None:
        """Put an image's pixels into a slot of the store, of a clip into one of its frames.

        Raises InvalidImage, TooManyPixels, or TooHard. Cancelled, it ends when nothing writes to
        the slot any more: at once if the decoding had not begun.
        """
        job = self._threads.submit(self._decode, image, slot, frame)
        waiting = asyncio.wrap_future(job)
        cancelled = False
        while not waiting.done():
            try:
                await asyncio.wait([waiting])
            except asyncio.CancelledError:
                cancelled = True
                job.cancel()  # does nothing to one that has begun
        if cancelled:
            if not waiting.cancelled():
                waiting.exception()  # asked for, or asyncio logs it
            raise asyncio.CancelledError
        waiting.result()

    def _decode(self, image: bytes, slot: int, frame: int | None) -> None:
        decoder = self._idle.get()
        try:
            failure = decoder.ask(image, slot, frame, self._seconds)
        except (OSError, EOFError) as cause:
            log.warning("a decoder process was replaced: %s", cause or type(cause).__name__)
            decoder.kill()
            self._all.discard(decoder)
            decoder = self._new()
            raise TooHard(
                f"decoding this image crashed, or took more than {self._seconds:g} s: "
                "save it again with another program, or make it smaller"
            ) from cause
        finally:
            self._idle.put(decoder)
        if failure is not None:
            kind, message = failure
            raise _ERRORS[kind](message)

    def close(self) -> None:
        """End all processes."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._all:
            decoder.kill()

    @property
    def pids(self) -> list[int]:
        """Of the processes that are idle now; for tests."""
        found = [self._idle.get() for _ in range(self._idle.qsize())]
        for decoder in found:
            self._idle.put(decoder)
        return [decoder.process.pid or 0 for decoder in found]


class _Decoder:
    """One process, and the pipe to it."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.due = math.inf  # when it must have answered, `time.monotonic()`
        self._pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def ask(
        self, image: bytes, slot: int, frame: int | None, seconds: float
    ) -> tuple[str, str] | None:
        """Have an image decoded; what was wrong with it, or None."""
        self.due = time.monotonic() + seconds
        try:
            self._pipe.send((slot, frame))
            self._pipe.send_bytes(image)
            return self._pipe.recv()
        finally:
            self.due = math.inf

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self._pipe.close()


def _serve(
    pipe: Connection,
    store: tuple[Path, int, tuple[int, ...]],
    how: Preprocessing,
    max_pixels: int,
    memory: int,
) -> None:
    """The decoder process: answers one image after the other."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads' stacks would count as address space
    from runtime.preprocess import preprocess
    from server.wire import PixelStore, follow_parent, give_way

    follow_parent()
    give_way()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pixels = PixelStore(*store)
    while True:
        try:
            slot, frame = pipe.recv()
            image = pipe.recv_bytes()
        except EOFError:
            return
        try:
            made = preprocess(image, how, max_pixels)
        except (InvalidImage, TooManyPixels) as error:
            pipe.send((type(error).__name__, str(error)))
            continue
        if frame is None:
            pixels[slot][:] = made
        else:
            pixels[slot][frame] = made
        pipe.send(None)
