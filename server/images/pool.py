"""Decodes images in separate processes, the expensive ones one at a time.

An image that crashes its decoder process, hangs in it or unpacks to gigabytes takes down only that
process, which is replaced.

Most images take milliseconds; some files of a few bytes take seconds and a gigabyte. So the cost of
an image is estimated from its header. Images above `_QUICK` go to the slow lane, a single process
of lower priority; the others never wait for them. In both lanes the clients take turns.
"""

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace

from server.fairness.fair_queue import FairQueue
from server.fairness.patient_queue import PatientQueue
from server.fairness.token_buckets import TokenBuckets
from server.images.clips import Clip
from server.images.cost import TooHard
from server.images.decoder import EXPENSIVE, FRAMES, PARTS, PIXELS, PixelSlot, Setup
from server.images.lane import UNFIT, DecodeTask, Lane, LeftQuickLane, OutOfTime, Unfit
from server.ipc.remembered import Remembered
from server.refusals import QueueFull
from server.requests.parts import Parts

_QUICK = 0.2  # estimated core seconds: what a camera's 12 megapixels take
_QUICK_LIMIT = 0.6  # core seconds in the quick lane, for an image that was estimated wrongly
_MISJUDGED = 1 / 60, 2.0  # underestimates per client, a second and at once; beyond, the slow lane
_MISJUDGED_SECONDS = 600.0  # after which underestimates are forgotten, at most
_CLIP_SECONDS = 1.0  # estimate for any clip
_WRONG = 0.1  # core seconds beyond the estimate that no photograph takes
_QUICK_MEMORY = 768 * 2**20  # bytes of a process of the quick lane, its libraries included
_LOWER = 5  # niceness of the slow lane, added to that of the quick one
_PATIENCE = 1.0  # seconds for which the slow lane waits for a client that sends one by one
_REMEMBERED_SECONDS = 3600.0
_LONGEST_WAIT = 60  # seconds that a client is told to wait
_LEARNING, _SLOWEST = 0.2, 4.0  # of the pace: weight of a new value, and its upper bound
_WAITING = (
    "this image takes long to decode, and others of that kind wait already: send a smaller one, or "
    "try again later"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Origin of a request's images: client, digest, and deadline (`time.perf_counter()`)."""

    client: str
    digest: str
    deadline: float


@dataclass(frozen=True, slots=True)
class ImageJob:
    """An image to decode. aside: context entered while the image is in the slow lane."""

    image: bytes
    slot: PixelSlot
    origin: Origin
    aside: Callable[[Origin], AbstractAsyncContextManager[None]] = lambda origin: nullcontext()


@dataclass(frozen=True, slots=True)
class _Cost:
    """Core seconds that an image is expected to take. estimated: by what it is, not by what others
    of its client took.
    """

    seconds: float
    estimated: bool = True


class ImageDecoders:
    """The decoder processes of a front-end. Used on one thread, which must outlive them."""

    def __init__(
        self, count: int, setup: Setup, seconds: float, longest_wait: float = 30.0
    ) -> None:
        """count: processes of the quick lane; that of the slow lane starts with its first image.

        seconds: core seconds after which an image is given up. longest_wait: most seconds in the
        slow lane, whatever the deadline.
        """
        self._longest_wait = longest_wait
        self._seconds = seconds
        self._wall = 2 * seconds + 1  # elapsed, after which an image is tried once more
        quick = replace(setup, memory=min(setup.memory, _QUICK_MEMORY))
        turns = FairQueue(count, beside=max(1, count // 2))
        self._quick = Lane(quick, turns).start(count)
        slow = replace(setup, niceness=setup.niceness + _LOWER)
        self._slow = Lane(slow, PatientQueue(_PATIENCE))
        self._too_hard = Remembered(_REMEMBERED_SECONDS)
        self._queued: Counter[str] = Counter()  # estimated ms in the slow lane, by client
        self._misjudged = TokenBuckets(*_MISJUDGED, longest=_MISJUDGED_SECONDS)
        self._pace = 1.0  # seconds there per estimated second

    async def decode(self, job: ImageJob) -> None:
        """Decode an image into its slot.

        Raises InvalidImage, TooManyPixels, TooHard or NoDecoder, and QueueFull if the slow lane is
        too full to decode it by the job's deadline. If cancelled, ends when nothing writes to the
        slot any more: at once if the decoding had not begun.
        """
        if job.origin.digest in self._too_hard:
            raise TooHard(UNFIT)
        try:
            clip = isinstance(job.image, Clip)  # its header does not tell how long it takes
            cost = _Cost(_CLIP_SECONDS) if clip else await self._decode_quickly(job)
            if cost is not None:
                await self._decode_slowly(job, cost)
        except Unfit as cause:
            self._too_hard.add(job.origin.digest)
            raise TooHard(UNFIT) from cause

    async def parts(self, body: bytes, client: str) -> Parts:
        """Parse a JSON body. Raises InvalidRequest, NoDecoder; TooHard if that takes too long."""
        try:
            task = DecodeTask(PARTS, body, self._seconds, self._wall)
            _, answer = await self._quick.ask(client, task)
        except Unfit as cause:
            raise TooHard("reading this JSON took too long: send less of it") from cause
        return Parts.unpacked(answer)

    async def _decode_quickly(self, job: ImageJob) -> _Cost | None:
        """Decode a cheap image and return None; return the cost of an expensive one."""
        seconds = min(_QUICK_LIMIT, self._seconds)
        client = job.origin.client
        task = DecodeTask(
            PIXELS, job.image, seconds, self._wall, job.slot, _QUICK,
            leaves=lambda: self._misjudged.owed(client) > 0,
            failed=lambda spent: self._took(client, spent - _QUICK),
        )  # fmt: skip
        try:
            kind, answer = await self._quick.ask(client, task)
        except LeftQuickLane:
            return _Cost(seconds, estimated=False)
        except OutOfTime:
            self._misjudged.spend(client, 1)
            if seconds == self._seconds:
                raise
            return _Cost(self._seconds, estimated=False)
        if kind == EXPENSIVE:
            return _Cost(json.loads(answer))
        self._took(client, json.loads(answer))
        return None

    def _took(self, client: str, beyond: float) -> None:
        """Note that an image took `beyond` seconds more than estimated."""
        if beyond > _WRONG:
            self._misjudged.spend(client, beyond / _QUICK_LIMIT)

    async def _decode_slowly(self, job: ImageJob, expected: _Cost) -> None:
        """Decode in the slow lane. Raises QueueFull, at once if the deadline can't be met. An image
        that finds the lane empty is tried: else a pace that was slow once would stay so.
        """
        cost = math.ceil(expected.seconds * 1e3)
        mine = self._queued[job.origin.client] + cost
        others = sum(
            min(q, mine) for client, q in self._queued.items() if client != job.origin.client
        )
        started, usual = time.perf_counter(), (mine + others) / 1e3
        wait = usual * (self._pace if self._queued else min(1.0, self._pace))
        left = min(job.origin.deadline - started, self._longest_wait)
        if wait > left:
            raise QueueFull(_WAITING, min(_LONGEST_WAIT, math.ceil(wait)))
        what = FRAMES if isinstance(job.image, Clip) else PIXELS
        begun: list[float] = []
        task = DecodeTask(
            what, job.image, self._seconds, math.inf, job.slot, until=started + left,
            begun=lambda: begun.append(time.perf_counter()),
        )  # fmt: skip
        self._queued[job.origin.client] += cost
        try:
            async with job.aside(job.origin):
                await self._slow.ask(job.origin.client, task)
            self._learn(expected, begun)
        except TimeoutError:
            self._learn(expected, begun, late=True)
            raise QueueFull(_WAITING, _LONGEST_WAIT) from None
        except asyncio.CancelledError:  # it may have hidden an error
            if time.perf_counter() >= task.until:
                self._learn(expected, begun, late=True)
            raise
        finally:
            self._queued[job.origin.client] -= cost
            self._queued += Counter()  # drops zero counts

    def _learn(self, expected: _Cost, begun: list[float], late: bool = False) -> None:
        """Learn the pace from an image. begun: when a process got it. late: it was given up, and
        would have taken longer.
        """
        if not begun or not expected.estimated:
            return
        pace = min(_SLOWEST, (time.perf_counter() - begun[-1]) / expected.seconds)
        self._pace += _LEARNING * ((max(pace, self._pace) if late else pace) - self._pace)

    def close(self) -> None:
        """Kill all processes."""
        self._quick.close()
        self._slow.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, that of the slow lane last, if started."""
        return self._quick.pids + self._slow.pids
