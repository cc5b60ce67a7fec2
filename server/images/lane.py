"""Image decoder processes of one niceness, and a fair queue of the tasks that wait for them."""

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
from server.images.decoder import BUG, FAILED, Decoder, PixelSlot, Setup, raised
from server.system import KILLED_FROM_OUTSIDE
from server.tasks import retrieve_error
from server.telemetry.logs import RateLimitedLog

log = logging.getLogger(__name__)

_START_SECONDS = 60.0
_GRACE_SECONDS = 0.5  # after a deadline, for what is about to end: a new process costs as much
UNFIT = (
    "decoding this image crashed, or took too long: save it again with another program, or make it "
    "smaller"
)
_NO_DECODER = "no process that decodes images starts here: see the log, and this host's limits"


class Unfit(VignetteError):
    """An image crashed its decoder process."""


class NoDecoder(VignetteError):
    """A decoder process ended as it started."""


class LeftQuickLane(Exception):
    """Raised when a task leaves the quick lane for the slow one."""


class OutOfTime(Unfit):
    """An image used up its core seconds."""


_NOWHERE = PixelSlot(0, 0)  # for data that is no image


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """A task for a decoder process: kind, data, and destination of the pixels.

    seconds: core seconds allowed. wall: elapsed seconds after which the process is replaced. most:
    estimated seconds above which an image is not decoded. until: deadline (`perf_counter`), waiting
    included. leaves: asked when the task's turn has come; if true, LeftQuickLane is raised. begun:
    called when a process gets it. failed: called with the core seconds spent on invalid data.
    """

    what: bytes
    data: bytes
    seconds: float
    wall: float
    slot: PixelSlot = _NOWHERE
    most: float = math.inf
    until: float = math.inf
    leaves: Callable[[], bool] = lambda: False
    begun: Callable[[], object] = lambda: None
    failed: Callable[[float], object] = lambda seconds: None


class Lane:
    """Decoder processes of one niceness, and the tasks that wait for them."""

    def __init__(self, setup: Setup, turns: FairQueue) -> None:
        """turns: with a place for each process."""
        self._setup, self._turns = setup, turns
        self._idle: deque[Decoder] = deque()
        self._seldom = RateLimitedLog(log)
        self._all: set[Decoder] = set()

    def start(self, count: int) -> "Lane":
        """Start `count` processes now; others start when needed."""
        self._idle.extend(self._new() for _ in range(count))
        return self

    async def ask(self, client: str, task: DecodeTask) -> tuple[bytes, bytes]:
        """Run a task; return kind and content of the reply.

        Raises the error in the data, Unfit, TooHard, NoDecoder or LeftQuickLane, and TimeoutError
        if it did not end in time. If cancelled, ends when nothing writes to the slot any more: at
        once if the task's turn had not come.
        """
        left = None if task.until == math.inf else task.until - time.perf_counter()
        async with asyncio.timeout(left):
            await self._turns.take(client)
        if task.leaves():
            self._turns.give(client, 0)
            raise LeftQuickLane
        return await _to_the_end(asyncio.create_task(self._ask(client, task)))

    async def _ask(self, client: str, task: DecodeTask) -> tuple[bytes, bytes]:
        began = time.perf_counter()
        try:
            found = await self._attempt(task) or await self._attempt(task)
        finally:
            self._turns.give(client, time.perf_counter() - began)
        if found is None:  # twice, most likely for lack of memory
            raise TooHard(UNFIT)
        kind, answer = found
        if kind == FAILED:
            error, seconds = raised(answer)
            task.failed(seconds)
            try:
                raise error
            finally:
                del error  # it and this frame would hold each other, and the image
        if kind == BUG:
            self._seldom.warning("an image was refused for an error of ours: %s", answer.decode())
            raise TooHard(UNFIT)
        return found

    async def _attempt(self, task: DecodeTask) -> tuple[bytes, bytes] | None:
        """Run a task once; None if the process was killed or stopped from outside meanwhile."""
        decoder = self._idle.popleft() if self._idle else self._new()
        try:
            if not decoder.process.is_alive():  # it died before this task
                decoder = self._replaced(decoder)
            async with asyncio.timeout(_START_SECONDS):
                await decoder.wait_until_ready()
            if (left := task.until - time.perf_counter()) > 0:
                task.begun()
                async with asyncio.timeout(min(task.wall, left + _GRACE_SECONDS)):
                    return await decoder.ask(
                        task.what, task.data, task.slot, task.seconds, task.most
                    )
        except TimeoutError as cause:
            ready, decoder = decoder.ready, self._replaced(decoder)
            if not ready:
                raise NoDecoder(_NO_DECODER) from cause
            if time.perf_counter() >= task.until:
                raise
            return None  # it was stopped, or starved: a decoder that works ends by its core seconds
        except (OSError, EOFError) as cause:
            code, ready = await decoder.death(), decoder.ready
            decoder = self._replaced(decoder)
            if code in KILLED_FROM_OUTSIDE:
                return None
            if not ready:
                raise NoDecoder(_NO_DECODER) from cause
            raise (OutOfTime if code == -signal.SIGPROF else Unfit)(UNFIT) from cause
        finally:
            self._idle.append(decoder)
        raise TimeoutError  # before it was begun

    def _new(self) -> Decoder:
        """Raises NoDecoder."""
        try:
            decoder = Decoder(self._setup)
        except OSError as cause:  # too many processes or files
            raise NoDecoder(f"{_NO_DECODER} ({cause})") from cause
        self._all.add(decoder)
        return decoder

    def _replaced(self, decoder: Decoder) -> Decoder:
        process = decoder.process
        self._seldom.warning("a decoder was replaced (exit code %s)", process.exitcode)
        decoder.kill()
        self._all.discard(decoder)
        return self._new()

    def close(self) -> None:
        """Kill all processes."""
        for decoder in self._all:
            decoder.kill()

    @property
    def pids(self) -> list[int]:
        """Process ids."""
        return [decoder.process.pid or 0 for decoder in self._all]


async def _to_the_end(task: "asyncio.Task[tuple[bytes, bytes]]") -> tuple[bytes, bytes]:
    """Result of a task; if the caller is cancelled, that is raised once the task has ended."""
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        retrieve_error(task)
        raise asyncio.CancelledError
    try:
        return task.result()
    finally:
        del task  # its error and this frame would hold each other, and an image
