"""Admission to a model: its state, and limits on the requests inside."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from runtime.errors import VignetteError
from server.fairness.recent_clients import RecentClients
from server.images.pool import Origin
from server.refusals import QueueFull
from server.service.drain_rate import DrainRate

_OLD_SECONDS = 60.0  # after which a client no longer counts as recent
_IN_TIME = 0.9  # of the deadline: the last request in the queue must meet it, too
_LONGEST_WAIT = 60  # seconds, the longest Retry-After
ASIDE, _FETCHING = 32, 256  # requests that may wait for a slow decoder, and for their images


class State(StrEnum):
    """State of a model or a whole server; only `READY` takes requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class NotServing(VignetteError):
    """The server or the model is starting or draining, or its engine does not start again."""


@dataclass(slots=True)
class _Aside:
    """Admitted requests that wait for something other than the engine; clients share the places.

    requests: the timeouts that end each one, one for each time it stepped aside, by its client and
    what tells it from others; the newest last.
    """

    most: int
    refusal: str
    requests: dict[tuple[str, Hashable], list[asyncio.Timeout]] = field(default_factory=dict)

    def makes_room(self, client: str) -> bool:
        """Whether another request of a client may step aside. Where there is room only for clients
        with less than their share, the newest request of who has most is ended for it.
        """
        here = [request for request, ends in self.requests.items() if ends[0].when() is None]
        of_each = Counter(owner for owner, _ in here)
        share = max(1, self.most // (len(of_each.keys() | {client}) + 1))
        if of_each[client] >= share:
            return False
        if len(here) < self.most:
            return True
        most = max(of_each.values())
        if most <= share:
            return False
        newest = next(request for request in reversed(here) if of_each[request[0]] == most)
        for end in self.requests[newest]:
            end.reschedule(asyncio.get_running_loop().time())
        return True


class Admission:
    """Counts the requests inside one model. Used on the event loop's thread only."""

    def __init__(
        self,
        queue: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Let at most `queue` requests wait, besides those that have a slot (set `slots`).

        deadline: seconds that a request has; no more requests wait than can be captioned in time.
        """
        self.state = State.STARTING
        self.failing = False  # no engine starts any more
        self.inside = 0
        self.slots = 0
        self._decoding = _Aside(
            ASIDE, "too many images that take long to decode are waiting: send smaller ones"
        )
        self._fetching = _Aside(
            _FETCHING, "too many images are being fetched: send the image itself"
        )
        self._queue, self._deadline = queue, deadline
        self._clock, self._rate = clock, DrainRate(clock)
        self._recent = RecentClients(clock)
        self._in_engine = 0  # rows
        self._preparing: Counter[str] = Counter()  # requests before the engine, by client

    @contextmanager
    def enter(self, client: str = "") -> Iterator[None]:
        """Hold a place while a request is served; raises what `check` raises."""
        self.note(client)
        self.check(client)
        self._count(client, 1)
        try:
            yield
        finally:
            self._count(client, -1)

    def _count(self, client: str, requests: int) -> None:
        self.inside += requests
        self._preparing[client] += requests
        if not self._preparing[client]:
            del self._preparing[client]

    def note(self, client: str) -> None:
        """Note that a client came for this model, whether there is a place for it or not."""
        self._recent.note(client)

    def check(self, client: str = "") -> None:
        """Raise NotServing or QueueFull if there is no place for a request of this client.

        Unless no other client came within the last minute, a client has a share of the queue
        before the engine: equal ones, and one that is left to the next client.
        """
        if self.state is not State.READY:
            raise NotServing(f"the server is {self.state}: try again soon, or another instance")
        if self.failing:
            raise NotServing(
                "the model's engine was lost and does not start: the log says why; try another "
                "instance"
            )
        self._check_room(client)

    def alone(self, client: str) -> bool:
        """Whether no other client came within the last minute."""
        return self._recent.within(_OLD_SECONDS) <= {client}

    def _check_room(self, client: str) -> None:
        if self.inside >= self._most:
            raise QueueFull("the queue is full: try again later", self._seconds_to_drain())
        if not self.alone(client) and self._preparing[client] >= self._share(client):
            raise QueueFull(
                "your share of the queue is full, and others wait, too: try again later",
                self._seconds_to_drain(),
            )

    def _share(self, client: str) -> int:
        waiting = {other for other, count in self._preparing.items() if count > 0} | {client}
        room = self._most - (self.inside - self._preparing.total())
        return max(1, room // (len(waiting) + 1))

    @contextmanager
    def engine(self, client: str = "", rows: int = 1) -> Iterator[None]:
        """Count an admitted request as in the engine: its pixels are ready.

        rows: slots that the request takes there.
        """
        self._in_engine += rows
        self._preparing[client] -= 1
        if self._in_engine > self.slots:
            self._rate.waiting()
        try:
            yield
            self._rate.completed()
        finally:
            self._in_engine -= rows
            self._preparing[client] += 1
            if self._in_engine <= self.slots:
                self._rate.idle()

    def aside(self, request: Origin) -> AbstractAsyncContextManager[None]:
        """Take an admitted request out of `inside` while it waits for a slow decoder.

        Raises QueueFull if too many wait for that, of all clients or of its own, also later, when
        a client comes that has fewer. May be entered several times at once for one request: for
        each frame of a clip.
        """
        return self._step_aside(self._decoding, request.client, request)

    @asynccontextmanager
    async def fetching(self, client: str = "") -> AsyncIterator[None]:
        """Take an admitted request out of `inside` while its image is fetched.

        Raises QueueFull as `aside` does, and if there is no room for it once that is done.
        """
        async with self._step_aside(self._fetching, client, object()):
            yield
            self._check_room(client)

    @asynccontextmanager
    async def _step_aside(
        self, waiting: _Aside, client: str, what: Hashable
    ) -> AsyncIterator[None]:
        request = client, what
        if request not in waiting.requests:
            if not waiting.makes_room(client):
                raise self._full(waiting)
            waiting.requests[request] = []
            self._count(client, -1)
        ends = waiting.requests[request]
        end = asyncio.timeout(None)
        ends.append(end)
        try:
            async with end:
                yield
        except TimeoutError:
            if not end.expired():
                raise
            raise self._full(waiting) from None
        finally:
            ends.remove(end)
            if not ends:
                del waiting.requests[request]
                self._count(client, 1)

    def _full(self, waiting: _Aside) -> QueueFull:
        return QueueFull(f"{waiting.refusal}, or try again later", self._seconds_to_drain())

    @property
    def accepted(self) -> int:
        """Admitted requests that are not over, including those aside."""
        return self.inside + len(self._decoding.requests) + len(self._fetching.requests)

    @property
    def _most(self) -> int:
        """The most requests that may be inside, given the room and the time.

        Some may always wait: without any, a recovered rate would never be noticed.
        """
        each = self._rate.seconds
        in_time = math.inf if not each else _IN_TIME * self._deadline / each
        return int(min(self.slots + self._queue, max(2 * self.slots, in_time)))

    def expect(self, seconds: float) -> None:
        """Set how long a request takes while others wait, until enough are measured."""
        self._rate.expected = seconds

    def served_again(self) -> None:
        """Note that the engine has a worker again: the time without one was not its pace."""
        self._rate.idle()
        if self._in_engine > self.slots:
            self._rate.waiting()

    def check_in_time(self, seconds: float, client: str = "") -> None:
        """Raise QueueFull if a new request of this client, which has entered, would have to wait
        for longer than it has: for those in the engine, the client's own, and as many of each other
        client, as slots are handed out in turns.
        """
        each, ahead = self._rate.seconds, self._ahead(client)
        if each and ahead >= 2 * self.slots and each * ahead > seconds:
            raise QueueFull(
                f"the requests before this one take about {each * ahead:.0f} s, longer than its "
                "deadline: try again later, or give it more (timeout_ms)",
                _retry_after(each * ahead),
            )

    def _ahead(self, client: str) -> int:
        waiting = self._preparing.copy()
        own = waiting.pop(client, 1)
        in_engine = self.inside - self._preparing.total()
        return in_engine + own - 1 + sum(min(own, count) for count in waiting.values())

    def _seconds_to_drain(self) -> int:
        """Seconds that the requests inside will take, from 1 to 60."""
        return _retry_after(self.inside * (self._rate.seconds or 0))


def _retry_after(seconds: float) -> int:
    return min(_LONGEST_WAIT, max(1, math.ceil(seconds)))
