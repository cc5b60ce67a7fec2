"""Decoder processes of one niceness, and those who wait for one of them, client by client."""

import asyncio
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import VignetteError
from server.fairness.fair_queue import FairQueue
from server.images.cost import TooHard
from server.images.decoder import BUG, FAILED, Decoder, Place, Setup, raised
from server.logs import Seldom
from server.system import KILLED_FROM_OUTSIDE
from server.tasks import note_error

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
UNFIT = (
    "decoding this image crashed, or took too long: save it again with another program, or make it "
    "smaller"
)


class Unfit(VignetteError):
    """An image crashed its decoder."""


class GaveWay(Exception):
    """The task withdrew when its turn came."""


class OutOfTime(Unfit):
    """An image used up the seconds of a core that it was given."""


_NOWHERE = Place(0, 0, -1)  # of what is no image


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """What a process is asked: kind, data, and where pixels go; an image only if it is estimated
    to take at most `most` seconds.

    seconds: of a core. wall: seconds by the clock, after which the process is replaced; until:
    the same as a time of `perf_counter`. gives_way: asked when its turn has come. failed: told the
    seconds of a core that were spent on data with which something is wrong.
    """

    what: bytes
    data: bytes
    seconds: float
    wall: float
    place: Place = _NOWHERE
    most: float = math.inf
    until: float = math.inf
    gives_way: Callable[[], bool] = lambda: False
    failed: Callable[[float], object] = lambda seconds: None


class Lane:
    """Processes of one niceness, and those who wait for one."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup, self._turns = setup, FairQueue(count, beside=max(1, count // 2))
        self._idle: deque[Decoder] = deque()
        self._seldom = Seldom(log)
        self._all: set[Decoder] = set()

    def start(self, count: int) -> "Lane":
        """Start processes now; others are when they are needed."""
        self._idle.extend(self._new() for _ in range(count))
        return self

    async def ask(self, client: str, task: DecodeTask) -> tuple[bytes, bytes]:
        """Kind and content of the answer.

        Raises what was wrong with the data, Unfit, TooHard or GaveWay, and TimeoutError if its
        turn did not come in time. Cancelled, it ends when nothing writes to the slot any more: at
        once if its turn had not come.
        """
        left = None if task.until == math.inf else task.until - time.perf_counter()
        async with asyncio.timeout(left):
            await self._turns.take(client)
        if task.gives_way():
            self._turns.give(client, 0)
            raise GaveWay
        return await _to_the_end(asyncio.create_task(self._ask(client, task)))

    async def _ask(self, client: str, task: DecodeTask) -> tuple[bytes, bytes]:
        began = time.perf_counter()
        try:
            found = await self._attempt(task) or await self._attempt(task)
        finally:
            self._turns.give(client, time.perf_counter() - began)
        if found is None:  # for want of memory, most likely
            raise TooHard(UNFIT)
        kind, answer = found
        if kind == FAILED:
            error, seconds = raised(answer)
            task.failed(seconds)
            try:
                raise error
            finally:
                del error  # it would hold this frame, and this frame the error, with the image
        if kind == BUG:
            self._seldom.warning("an image was refused for an error of ours: %s", answer.decode())
            raise TooHard(UNFIT)
        return found

    async def _attempt(self, task: DecodeTask) -> tuple[bytes, bytes] | None:
        """Ask a process; None if somebody else has killed it meanwhile."""
        decoder = self._idle.popleft() if self._idle else self._new()
        try:
            if not decoder.process.is_alive():  # it died of something else than this image
                decoder = self._replaced(decoder)
            async with asyncio.timeout(_START_SECONDS):
                await decoder.started()
            async with asyncio.timeout(min(task.wall, task.until - time.perf_counter())):
                return await decoder.ask(task.what, task.data, task.place, task.seconds, task.most)
        except TimeoutError as cause:
            decoder = self._replaced(decoder)
            raise TooHard(UNFIT) from cause
        except (OSError, EOFError) as cause:
            code = await decoder.death()
            decoder = self._replaced(decoder)
            if code in KILLED_FROM_OUTSIDE:
                return None
            raise (OutOfTime if code == -signal.SIGPROF else Unfit)(UNFIT) from cause
        finally:
            self._idle.append(decoder)

    def _new(self) -> Decoder:
        decoder = Decoder(self._setup)
        self._all.add(decoder)
        return decoder

    def _replaced(self, decoder: Decoder) -> Decoder:
        process = decoder.process
        self._seldom.warning("a decoder was replaced (exit code %s)", process.exitcode)
        decoder.kill()
        self._all.discard(decoder)
        return self._new()

    def close(self) -> None:
        """End all processes."""
        for decoder in self._all:
            decoder.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [decoder.process.pid or 0 for decoder in self._all]


async def _to_the_end(task: "asyncio.Task[tuple[bytes, bytes]]") -> tuple[bytes, bytes]:
    """The result of a task that goes on while the caller is cancelled, who then waits for it."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        note_error(task)
        raise asyncio.CancelledError
    try:
        return task.result()
    finally:
        del task  # its error would hold this frame, and this frame the error, with an image in it
