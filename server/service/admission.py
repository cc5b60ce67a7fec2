"""Who may come in: the server's state, and bounds on the requests inside and on their bytes."""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

from runtime.errors import VignetteError

_RECENT = 64  # completions that the drain rate is taken from
_ENOUGH = 4  # to go by
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
    """How long a request takes while others wait for its slot; idle times do not count."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self.expected: float | None = None  # as measured before the first request
        self._since: float | None = None  # when the last one was completed, or waiting began

    def waiting(self, now: float) -> None:
        """There is a request without a slot."""
        if self._since is None:
            self._since = now

    def completed(self, now: float) -> None:
        """A request was answered with its caption."""
        if self._since is not None:
            self._seconds.append(now - self._since)
            self._since = now

    def idle(self) -> None:
        """None waits any more."""
        self._since = None

    @property
    def seconds(self) -> float | None:
        """For each request; as expected while too few have been seen, or None."""
        if len(self._seconds) < _ENOUGH:
            return self.expected
        return sum(self._seconds) / len(self._seconds)


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
        self._clock, self._rate = clock, DrainRate()

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place while a request is served; raises NotServing or QueueFull."""
        if self.state is not State.READY:
            raise NotServing(f"the server is {self.state}: try again soon, or another instance")
        if self.inside >= self._most:
            raise QueueFull("the queue is full: try again later", self._seconds_to_drain())
        self._come_in()
        try:
            yield
            self._rate.completed(self._clock())
        finally:
            self._leave()

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
        if first:
            self._leave()
        try:
            yield
        finally:
            self._aside[request] -= 1
            if not self._aside[request]:
                del self._aside[request]
                self._come_in()

    def _come_in(self) -> None:
        self.inside += 1
        if self.inside > self.slots:
            self._rate.waiting(self._clock())

    def _leave(self) -> None:
        self.inside -= 1
        if self.inside <= self.slots:
            self._rate.idle()

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
        if each and ahead >= self.slots and each * ahead > seconds:
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
