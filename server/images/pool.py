"""Decoding images in processes of their own, those that are dear behind one another.

An image that crashes its decoder, hangs in it or unpacks to gigabytes takes that process with it
and nothing else: the next image finds a new one.

Most images take milliseconds; some files of a few bytes take seconds and a gigabyte. So what an
image will cost is estimated from its head. Those that take longer than `_QUICK` wait for the one
process that decodes them, at a lower priority, and the others never wait for any of them. In both
lanes the clients take turns.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from server.bodies import Parts
from server.fairness.errors import QueueFull
from server.fairness.token_buckets import TokenBuckets
from server.images.clips import Clip
from server.images.cost import TooHard
from server.images.decoder import DEAR, FRAMES, PARTS, PIXELS, Place, Setup
from server.images.lane import UNFIT, DecodeTask, GaveWay, Lane, OutOfTime, Unfit
from server.ipc.remembered import Remembered

_QUICK = 0.15  # estimated seconds of a core: what a camera's 12 megapixels take
_QUICK_LIMIT = 0.6  # seconds of a core, of an image that was estimated wrongly
_MISJUDGED = 1 / 60, 2.0  # of a client, a second and at once: more than that is taken for dear
_MISJUDGED_SECONDS = 600.0  # that it takes to be forgotten, at most
_CLIP_SECONDS = 1.0  # that a clip counts as among the dear ones
_WRONG = 0.1  # seconds of a core beyond the estimate that are none of a photograph's
_QUICK_MEMORY = 768 * 2**20  # of a process that decodes usual images, its libraries included
_LOWER = 5  # niceness of the slow lane, beside that of the others
_REMEMBERED_SECONDS = 3600.0
_LONGEST_WAIT = 60  # seconds that a client is told to wait
_LEARNING, _SLOWEST = 0.2, 4.0  # of the pace: how fast it is learnt, and the most that it becomes
_WAITING = (
    "this image takes long to decode, and others of that kind wait already: send a smaller one, or "
    "try again later"
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose a request's images are: the client whose turn they take, the digest by which they are
    known again, and their deadline (`time.perf_counter()`).
    """

    client: str
    digest: str
    deadline: float


@dataclass(frozen=True, slots=True)
class ImageJob:
    """An image to decode. aside: entered while it waits among the dear ones."""

    image: bytes
    place: Place
    origin: Origin
    aside: Callable[[Origin], AbstractContextManager[None]] = lambda origin: nullcontext()


class ImageDecoders:
    """The decoder processes of a front-end. Used on one thread, which has to outlive them."""

    def __init__(
        self, count: int, setup: Setup, seconds: float, longest_wait: float = 30.0
    ) -> None:
        """count: processes, beside the one for dear images, which is started for the first of them.

        seconds: of a core, for one image, after which it is given up. longest_wait: seconds that a
        dear one waits at most, whatever its deadline.
        """
        self._longest_wait = longest_wait
        self._seconds = seconds
        self._wall = 2 * seconds + 1  # by the clock: by then it is not the processor that it lacks
        quick = replace(setup, memory=min(setup.memory, _QUICK_MEMORY))
        self._quick = Lane(quick, count).start(count)
        self._slow = Lane(replace(setup, niceness=setup.niceness + _LOWER), 1)
        self._too_hard = Remembered(_REMEMBERED_SECONDS)
        self._queued: Counter[str] = Counter()  # estimated ms in the slow lane, by client
        self._misjudged = TokenBuckets(*_MISJUDGED, longest=_MISJUDGED_SECONDS)
        self._pace = 1.0  # seconds that an estimated one takes there

    async def decode(self, job: ImageJob) -> None:
        """Put an image's pixels into its slot.

        Raises InvalidImage, TooManyPixels or TooHard, and QueueFull if more dear images wait than
        can be decoded until the job's deadline. Cancelled, it ends when nothing writes to the slot
        any more: at once if the decoding had not begun.
        """
        if job.origin.digest in self._too_hard:
            raise TooHard(UNFIT)
        try:
            clip = isinstance(job.image, Clip)  # its head does not tell how long one takes
            seconds = _CLIP_SECONDS if clip else await self._decode_quickly(job)
            if seconds:
                await self._decode_slowly(job, seconds)
        except Unfit as cause:
            self._too_hard.add(job.origin.digest)
            raise TooHard(UNFIT) from cause

    async def parts(self, body: bytes, client: str) -> Parts:
        """Take a JSON body apart. Raises InvalidRequest; TooHard if that takes too long."""
        try:
            task = DecodeTask(PARTS, body, self._seconds, self._wall)
            _, answer = await self._quick.ask(client, task)
        except Unfit as cause:
            raise TooHard("reading this JSON took too long: send less of it") from cause
        return Parts.unpacked(answer)

    async def _decode_quickly(self, job: ImageJob) -> float:
        """Decode what takes little, and return 0; of another image the seconds as estimated."""
        seconds = min(_QUICK_LIMIT, self._seconds)
        client = job.origin.client
        task = DecodeTask(
            PIXELS, job.image, seconds, self._wall, job.place, _QUICK,
            gives_way=lambda: self._misjudged.owed(client) > 0,
            failed=lambda spent: self._took(client, spent - _QUICK),
        )  # fmt: skip
        try:
            kind, answer = await self._quick.ask(client, task)
        except GaveWay:
            return seconds
        except OutOfTime:
            self._misjudged.spend(client, 1)
            if seconds == self._seconds:
                raise
            return self._seconds  # the estimate was wrong
        if kind == DEAR:
            return json.loads(answer)
        self._took(client, json.loads(answer))
        return 0.0

    def _took(self, client: str, beyond: float) -> None:
        """An image of this client's took so many seconds more than it was to."""
        if beyond > _WRONG:
            self._misjudged.spend(client, beyond / _QUICK_LIMIT)

    async def _decode_slowly(self, job: ImageJob, seconds: float) -> None:
        """Decode in the slow lane; what would wait there beyond its deadline is refused now."""
        cost = math.ceil(seconds * 1e3)
        mine = self._queued[job.origin.client] + cost
        others = sum(
            min(q, mine) for client, q in self._queued.items() if client != job.origin.client
        )
        started, usual = time.perf_counter(), (mine + others) / 1e3
        wait = usual * self._pace
        left = min(job.origin.deadline - started, self._longest_wait)
        if wait > left:
            raise QueueFull(_WAITING, min(_LONGEST_WAIT, math.ceil(wait)))
        what = FRAMES if isinstance(job.image, Clip) else PIXELS
        task = DecodeTask(what, job.image, self._seconds, left, job.place, until=started + left)
        self._queued[job.origin.client] += cost
        try:
            with job.aside(job.origin):
                await self._slow.ask(job.origin.client, task)
        except TimeoutError:
            raise QueueFull(_WAITING, _LONGEST_WAIT) from None
        finally:
            self._queued[job.origin.client] -= cost
            self._queued += Counter()  # without those that have nothing there
        took = (time.perf_counter() - started) / usual
        self._pace += _LEARNING * (min(took, _SLOWEST) - self._pace)

    def close(self) -> None:
        """End all processes."""
        self._quick.close()
        self._slow.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, that for dear images last, if there is one."""
        return self._quick.pids + self._slow.pids
