"""One image decoder process: decodes images to pixels, and parses large JSON bodies.

Image codecs are C code that is fed untrusted data, so this process has limits on memory and time,
and is not trusted: it replies with bytes, never pickles.
"""

import asyncio
import json
import math
import multiprocessing
import os
import signal
import socket
import struct
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels, VignetteError
from runtime.model.manifest import Preprocessing
from runtime.model.preprocess import opened, prepared, to_pixels
from server.images import heads
from server.images.clips import frames_of
from server.images.cost import TooHard, estimate
from server.ipc.shared import PixelStore
from server.requests.json_body import json_parts
from server.system import (
    environment,
    follow_parent,
    give_way,
    limit_memory,
    own_memory,
    trim_memory,
)

_KEPT = 64 * 2**20  # bytes of freed memory that the process may keep
_ENVIRONMENT = {  # set before the process loads any library
    "OPENBLAS_NUM_THREADS": "1",  # its threads' stacks would count as address space
    # glibc keeps freed memory up to this size for the next image: clearing fresh pages from the
    # system takes as long as decoding a small image.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}
# Tasks: pixels of an image, pixels of a clip's frames, parts of a JSON body.
PIXELS, FRAMES, PARTS = b"P", b"F", b"J"
# Replies: the parts, or the core seconds that an image took beyond its estimate; the error in the
# data, and the core seconds until it was found; the estimate of an image too expensive to decode;
# the traceback of a bug.
DONE, FAILED, EXPENSIVE, BUG = b"D", b"F", b"E", b"B"
# task, bytes that follow, slot, limit of processor seconds, most estimated seconds
_HEAD = struct.Struct("=cIHIidd")
_ANSWER = struct.Struct("=cI")  # reply, bytes that follow
_READY = b"R"
_PIECE = 2**20
_CLIP_AXES = 4  # of a slot's pixels: frames, channels, height, width
_USUAL_MEMORY = 256 * 2**20  # bytes that an image may take while others are decoded
_ERRORS = {kind.__name__: kind for kind in (InvalidImage, InvalidRequest, TooManyPixels, TooHard)}
_CONTEXT = multiprocessing.get_context("spawn")


WHOLE = -1  # of a slot: all its frames


class PixelSlot(NamedTuple):
    """Where pixels go: a model's store, a slot of it by number, and a frame of that, or WHOLE."""

    model: int
    number: int
    frame: int = WHOLE


@dataclass(frozen=True, slots=True)
class Target:
    """A model's pixel store and preprocessing. store: path, slots and shape of its PixelStore."""

    store: tuple[Path, int, tuple[int, ...]]
    how: Preprocessing


@dataclass(frozen=True, slots=True)
class Setup:
    """Configuration of a decoder process.

    targets: one per model, indexed by `PixelSlot.model`. memory: bytes of address space besides the
    stores. niceness: added to the front-end's.
    """

    targets: tuple[Target, ...]
    max_pixels: int
    memory: int
    niceness: int


class Decoder:
    """Handle of a decoder process, with its socket. Used on one thread, which must outlive it."""

    def __init__(self, setup: Setup) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self.ready = False
        with theirs:
            self.process = _CONTEXT.Process(target=_serve, args=(theirs, setup), daemon=True)
            with environment(_ENVIRONMENT):
                self.process.start()
            give_way(setup.niceness, self.process.pid)  # now: its imports take long

    async def wait_until_ready(self) -> None:
        """Wait until the process has started: loading libraries does not count as decoding."""
        if not self.ready:
            await self._read(len(_READY))
            self.ready = True

    async def ask(
        self, what: bytes, data: bytes, slot: PixelSlot, seconds: float, most: float
    ) -> tuple[bytes, bytes]:
        """Run a task; return kind and content of the reply. Raises OSError or EOFError.

        seconds: of processor time, after which the process dies. most: estimated seconds above
        which an image is not decoded, and the reply is EXPENSIVE.
        """
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, _HEAD.pack(what, len(data), *slot, seconds, most))
        await loop.sock_sendall(self._socket, data)
        kind, length = _ANSWER.unpack(await self._read(_ANSWER.size))
        return kind, bytes(await self._read(length))

    async def _read(self, size: int) -> bytearray:
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < size:
            part = await loop.sock_recv(self._socket, min(_PIECE, size - len(data)))
            if not part:
                raise EOFError("it has ended")
            data += part
        return data

    async def death(self) -> int | None:
        """Exit code of a process that closed its socket; None if it is alive after a second."""
        for _ in range(100):
            if self.process.exitcode is not None:
                break
            await asyncio.sleep(0.01)
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process, and close the socket."""
        self.process.kill()
        self._socket.close()


def raised(payload: bytes) -> tuple[VignetteError, float]:
    """The error in a FAILED reply, and the core seconds until it was found."""
    kind, message, seconds = json.loads(payload)
    return _ERRORS[kind](message), seconds


def _serve(socket: socket.socket, setup: Setup) -> None:
    """Entry point of the process: run one task after the other."""
    follow_parent()
    stores = [PixelStore(*target.store) for target in setup.targets]
    Image.MAX_IMAGE_PIXELS = None  # Setup.max_pixels counts
    limit_memory(setup.memory + sum(store.size for store in stores))
    at_first = own_memory()
    socket.sendall(_READY)
    # Libraries write warnings about untrusted data to standard error, without limit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stream = socket.makefile("rb")
    while head := stream.read(_HEAD.size):
        what, size, *slot, seconds, most = _HEAD.unpack(head)
        data = stream.read(size)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the process
        started = time.process_time()
        try:
            if what == PARTS:
                kind, answer = _parts(data)
            elif what == FRAMES:
                kind, answer = _frames(data, setup, stores, PixelSlot(*slot))
            else:
                kind, answer = _pixels(data, setup, stores, PixelSlot(*slot), most)
        except VignetteError as error:
            told = [type(error).__name__, str(error), time.process_time() - started]
            kind, answer = FAILED, json.dumps(told).encode()
        except Exception:
            kind, answer = BUG, traceback.format_exc().encode(errors="replace")
        signal.setitimer(signal.ITIMER_PROF, 0)
        socket.sendall(_ANSWER.pack(kind, len(answer)) + answer)
        if own_memory() > at_first + _KEPT:  # fragments after a large image
            trim_memory()


def _pixels(
    data: bytes, setup: Setup, stores: list[PixelStore], slot: PixelSlot, most: float
) -> tuple[bytes, bytes]:
    """Decode an image into a slot of the store, or into one frame of the slot."""
    started = time.process_time()
    heads.check(data)
    image = opened(data, setup.max_pixels)
    how = setup.targets[slot.model].how
    cost = estimate(image, data, how)
    if cost.seconds > most or (most < math.inf and cost.memory > _USUAL_MEMORY):
        return EXPENSIVE, json.dumps(cost.seconds).encode()
    if cost.memory > setup.memory:
        raise TooHard(
            f"decoding this image would take {cost.memory // 2**20} MiB, and there are "
            f"{setup.memory // 2**20}: make it smaller"
        )
    pixels = prepared(image, how, setup.max_pixels)
    frame = ... if slot.frame < 0 else slot.frame
    stores[slot.model][slot.number][frame] = pixels
    return DONE, json.dumps(time.process_time() - started - cost.seconds).encode()


def _frames(
    data: bytes, setup: Setup, stores: list[PixelStore], slot: PixelSlot
) -> tuple[bytes, bytes]:
    """Decode frames of a clip into a slot of the store, as many as it has room for."""
    heads.check(data)
    how, pixels = setup.targets[slot.model].how, stores[slot.model][slot.number]
    rows = pixels if pixels.ndim == _CLIP_AXES else pixels[None]
    for row, frame in zip(rows, frames_of(data, len(rows), setup.max_pixels), strict=True):
        row[...] = to_pixels(frame, how, setup.max_pixels)
    return DONE, json.dumps(0.0).encode()


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """Parse a JSON body; the reply is encoded by `server.requests.parts.Parts.packed`."""
    return DONE, json_parts(data).packed()
