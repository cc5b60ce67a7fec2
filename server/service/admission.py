"""Who may come in: the server's state, and bounds on the requests inside and on their bytes."""

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

from runtime.errors import VignetteError

_RECENT = 64  # completions that the drain rate is taken from
_ENOUGH = 4  # to go by
_OLD_SECONDS = 60.0  # after which what was seen says nothing any more
_IN_TIME = 0.9  # of the deadline: the last in the queue must make it, too
_LONGEST_WAIT = 60  # seconds that a client is told to wait
ASIDE = 32  # requests that may wait for something else than the engine, half of them one client's


class State(StrEnum):
    """What the server is doing; only `READY` takes requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class NotServing(VignetteError):
    """The server is starting or draining."""


class QueueFull(VignetteError):
    """No room for another request; `retry_after` says in how many seconds there may be."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainRate:
    """How long the engine takes for a request while others wait for its slot.

    Idle times do not count, nor what was seen more than a minute ago: times change.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # when, and seconds
        self.expected: float | None = None  # as measured before the first request
        self._since: float | None = None  # when the last one was completed, or waiting began

    def waiting(self) -> None:
        """There is a request without a slot."""
        if self._since is None:
            self._since = self._clock()

    def completed(self) -> None:
        """A request was answered with its caption."""
        if self._since is not None:
            now = self._clock()
            self._seen.append((now, now - self._since))
            self._since = now

    def idle(self) -> None:
        """None waits any more."""
        self._since = None

    @property
    def seconds(self) -> float | None:
        """For each request; as expected while too few have been seen, or None."""
        while self._seen and self._clock() - self._seen[0][0] > _OLD_SECONDS:
            self._seen.popleft()
        if len(self._seen) < _ENOUGH:
            return self.expected
        return sum(seconds for _, seconds in self._seen) / len(self._seen)


class Aside(Hashable, Protocol):
    """What is told of a request that steps aside."""

    @property
    def client(self) -> str:
        """Whose it is."""


class Admission:
    """Counts the requests that are inside. Used on the event loop's thread only."""

    def __init__(
        self,
        queue: int,
        most_bytes: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Let at most `queue` requests wait, besides those that have a slot (set `slots`).

        most_bytes: of all bodies together, those that are still coming in too.
        deadline: seconds that a request has; no more wait than can be captioned in time.
        """
        self.state = State.STARTING
        self.inside = 0
        self.slots = 0
        self.held_bytes = 0
        self._aside: Counter[Aside] = Counter()
        self._bytes: Counter[str] = Counter()  # by client
        self._queue, self._most_bytes, self._deadline = queue, most_bytes, deadline
        self._clock, self._rate = clock, DrainRate(clock)
        self._in_engine = 0
        self._preparing: Counter[str] = Counter()  # requests before the engine, by client
        self._clients: OrderedDict[str, float] = OrderedDict()  # when each came last

    @contextmanager
    def enter(self, client: str = "") -> Iterator[None]:
        """Hold a place while a request is served; raises NotServing or QueueFull.

        Half of the queue is one client's at most before the engine, as soon as another comes, too.
        """
        if self.state is not State.READY:
            raise NotServing(f"the server is {self.state}: try again soon, or another instance")
        alone = self._comes(client)
        if self.inside >= self._most:
            raise QueueFull("the queue is full: try again later", self._seconds_to_drain())
        if not alone and self._preparing[client] >= max(self.slots, self._most // 2):
            raise QueueFull(
                "half of the queue is yours, and others wait, too: try again later",
                self._seconds_to_drain(),
            )
        self.inside += 1
        self._preparing[client] += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._preparing[client] -= 1
            if not self._preparing[client]:
                del self._preparing[client]

    def _comes(self, client: str) -> bool:
        """Note who comes; whether no other has come for a while."""
        now = self._clock()
        self._clients[client] = now
        self._clients.move_to_end(client)
        if len(self._clients) > 2:  # this one, and whoever came last before it
            self._clients.popitem(last=False)
        return now - min(self._clients.values()) > _OLD_SECONDS or len(self._clients) == 1

    @contextmanager
    def engine(self, client: str = "") -> Iterator[None]:
        """A request that was let in has its pixels, and waits for the engine alone."""
        self._in_engine += 1
        self._preparing[client] -= 1
        if self._in_engine > self.slots:
            self._rate.waiting()
        try:
            yield
            self._rate.completed()
        finally:
            self._in_engine -= 1
            self._preparing[client] += 1
            if self._in_engine <= self.slots:
                self._rate.idle()

    @contextmanager
    def aside(self, request: Aside) -> Iterator[None]:
        """A request that was let in waits for something else than the engine: it is not inside.

        Raises QueueFull if too many do, of all clients or of its own. It may be given several times
        at once, for each frame of a clip.
        """
        first = request not in self._aside
        of_client = sum(other.client == request.client for other in self._aside)
        if first and (len(self._aside) >= ASIDE or of_client >= ASIDE // 2):
            raise QueueFull(
                "too many images that take long to decode are waiting: send smaller ones, or try "
                "again later",
                self._seconds_to_drain(),
            )
        self._aside[request] += 1
        self.inside -= first
        try:
            yield
        finally:
            self._aside[request] -= 1
            if not self._aside[request]:
                del self._aside[request]
                self.inside += 1

    @property
    def _most(self) -> int:
        """Requests that may be inside: those for which there is room, and time.

        Some may always wait: without any, it would never be seen that the rate is better again.
        """
        each = self._rate.seconds
        in_time = math.inf if not each else _IN_TIME * self._deadline / each
        return int(min(self.slots + self._queue, max(2 * self.slots, in_time)))

    def expect(self, seconds: float) -> None:
        """A request takes about so long while others wait, until more is known."""
        self._rate.expected = seconds

    def check_in_time(self, seconds: float) -> None:
        """Raise QueueFull if the requests inside take longer than one has that was just let in."""
        each, ahead = self._rate.seconds, self.inside - 1
        if each and ahead >= 2 * self.slots and each * ahead > seconds:
            raise QueueFull(
                f"the requests before this one take about {each * ahead:.0f} s, longer than its "
                "deadline: try again later, or give it more (timeout_ms)",
                self._seconds_to_drain(),
            )

    def hold(self, size: int, client: str) -> None:
        """Count bytes of a body in.

        Raises QueueFull if there are too many already; half of them may be one client's.
        """
        of_client = self._bytes[client] + size
        if self.held_bytes + size > self._most_bytes or of_client > self._most_bytes // 2:
            raise QueueFull(
                "too many bytes are being sent at once: try again later", self._seconds_to_drain()
            )
        self.owe(size, client)

    def owe(self, size: int, client: str) -> None:
        """Count bytes of an answer in, which can't be refused any more."""
        self.held_bytes += size
        self._bytes[client] += size

    def let_go(self, size: int, client: str) -> None:
        """Count them out again."""
        self.held_bytes -= size
        self._bytes[client] -= size
        if not self._bytes[client]:
            del self._bytes[client]

    def _seconds_to_drain(self) -> int:
        """How long the requests inside will take, from 1 to a minute."""
        return min(_LONGEST_WAIT, max(1, math.ceil(self.inside * (self._rate.seconds or 0))))
