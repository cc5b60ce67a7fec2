"""Decoding images in processes of their own, under limits on memory and time.

Image decoders are C code that is fed whatever strangers send. One that crashes, hangs or unpacks
to gigabytes takes its process with it and nothing else: the next image finds a new one.

A front-end and its decoders talk over socket pairs: the head and the bytes of an image there, the
length of what was wrong with it, and that, back.
"""

import asyncio
import json
import logging
import multiprocessing
import resource
import socket
import struct
from collections import deque
from pathlib import Path

from runtime.errors import InvalidImage, TooManyPixels, VignetteError
from runtime.manifest import Preprocessing

log = logging.getLogger(__name__)

ENVIRONMENT = {  # of the process that starts decoders, which inherit it before they load anything
    "OPENBLAS_NUM_THREADS": "1",  # its threads' stacks would count as address space
    # glibc's allocator keeps what is freed, up to so many bytes, for the next image: pages that the
    # system gives out anew each time take as long to clear as a small image takes to decode.
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(64 * 2**20),
}
_HEAD = struct.Struct("=IIi")  # bytes of the image, slot, frame or -1
_LENGTH = struct.Struct("=I")
_READY = b"R"
_START_SECONDS = 60.0
_ERRORS: dict[str, type[VignetteError]] = {
    "InvalidImage": InvalidImage,
    "TooManyPixels": TooManyPixels,
}
_CONTEXT = multiprocessing.get_context("spawn")
_Arguments = tuple[tuple[Path, int, tuple[int, ...]], Preprocessing, int, int]


class TooHard(VignetteError):
    """Decoding this image took too long, or too much memory."""


class Decoders:
    """A pool of decoder processes. Used on one thread, which has to outlive them."""

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
        self._arguments: _Arguments = (store, how, max_pixels, memory)
        self._seconds = seconds
        self._all = {_Decoder(self._arguments) for _ in range(count)}
        self._idle = deque(self._all)
        self._free = asyncio.Semaphore(count)  # fair, which an asyncio.Queue is not

    async def decode(self, image: bytes, slot: int, frame: int | None) -> None:
        """Put an image's pixels into a slot of the store, of a clip into one of its frames.

        Raises InvalidImage, TooManyPixels, or TooHard. Cancelled, it ends when nothing writes to
        the slot any more: at once if the decoding had not begun.
        """
        await self._free.acquire()
        job = asyncio.create_task(self._decode(image, slot, frame))
        cancelled = False
        while not job.done():
            try:
                await asyncio.wait([job])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            job.exception()  # asked for, or asyncio logs it
            raise asyncio.CancelledError
        job.result()

    async def _decode(self, image: bytes, slot: int, frame: int | None) -> None:
        decoder = self._idle.popleft()
        try:
            if not decoder.process.is_alive():  # it died of something else than this image
                decoder = self._replaced(decoder)
            async with asyncio.timeout(_START_SECONDS):
                await decoder.started()
            async with asyncio.timeout(self._seconds):
                failure = await decoder.ask(image, slot, frame)
        except (OSError, EOFError) as cause:  # TimeoutError is an OSError
            log.warning("a decoder process: %s", str(cause) or type(cause).__name__)
            decoder = self._replaced(decoder)
            raise TooHard(
                f"decoding this image crashed, or took more than {self._seconds:g} s: "
                "save it again with another program, or make it smaller"
            ) from cause
        finally:
            self._idle.append(decoder)
            self._free.release()
        if failure is not None:
            kind, message = failure
            raise _ERRORS[kind](message)

    def _replaced(self, decoder: "_Decoder") -> "_Decoder":
        log.warning("decoder process %s is replaced", decoder.process.pid)
        decoder.kill()
        self._all.discard(decoder)
        new = _Decoder(self._arguments)
        self._all.add(new)
        return new

    def close(self) -> None:
        """End all processes."""
        for decoder in self._all:
            decoder.kill()

    @property
    def pids(self) -> list[int]:
        """Of all processes; for tests."""
        return [decoder.process.pid or 0 for decoder in self._all]


class _Decoder:
    """One process, and the socket to it."""

    def __init__(self, arguments: _Arguments) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        self._started = False
        with theirs:
            self.process = _CONTEXT.Process(target=_serve, args=(theirs, *arguments), daemon=True)
            self.process.start()

    async def started(self) -> None:
        """Wait until it is there; loading its libraries is not to count as decoding."""
        if not self._started:
            await self._read(len(_READY))
            self._started = True

    async def ask(self, image: bytes, slot: int, frame: int | None) -> tuple[str, str] | None:
        """Have an image decoded; what was wrong with it, or None. Raises OSError or EOFError."""
        loop = asyncio.get_running_loop()
        head = _HEAD.pack(len(image), slot, -1 if frame is None else frame)
        await loop.sock_sendall(self._socket, head)
        await loop.sock_sendall(self._socket, image)
        [length] = _LENGTH.unpack(await self._read(_LENGTH.size))
        return json.loads(await self._read(length)) if length else None

    async def _read(self, size: int) -> bytes:
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < size:
            part = await loop.sock_recv(self._socket, size - len(data))
            if not part:
                raise EOFError("it has ended")
            data += part
        return data

    def kill(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self._socket.close()


def _serve(
    socket: socket.socket,
    store: tuple[Path, int, tuple[int, ...]],
    how: Preprocessing,
    max_pixels: int,
    memory: int,
) -> None:
    """The decoder process: answers one image after the other."""
    from runtime.preprocess import preprocess
    from server.wire import PixelStore, follow_parent, give_way

    follow_parent()
    give_way()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pixels = PixelStore(*store)
    socket.sendall(_READY)
    stream = socket.makefile("rb")
    while head := stream.read(_HEAD.size):
        size, slot, frame = _HEAD.unpack(head)
        image = stream.read(size)
        try:
            made = preprocess(image, how, max_pixels)
        except (InvalidImage, TooManyPixels) as error:
            failure = json.dumps([type(error).__name__, str(error)]).encode()
            socket.sendall(_LENGTH.pack(len(failure)) + failure)
            continue
        pixels[slot][... if frame < 0 else frame] = made
        socket.sendall(_LENGTH.pack(0))
