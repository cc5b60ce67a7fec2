"""Who may come in to a model: its state, and bounds on the requests inside."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from runtime.errors import VignetteError
from server.fairness.errors import QueueFull
from server.fairness.recent_clients import RecentClients
from server.images.pool import Origin
from server.service.drain_rate import DrainRate

_OLD_SECONDS = 60.0  # after which a client that came says nothing any more
_IN_TIME = 0.9  # of the deadline: the last in the queue must make it, too
_LONGEST_WAIT = 60  # seconds that a client is told to wait
ASIDE = 32  # requests that may wait for something else than the engine, half of them one client's


class State(StrEnum):
    """What a model, or all of a server, is doing; only `READY` takes requests."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"


class NotServing(VignetteError):
    """The server, or this model of it, is starting or draining."""


class Admission:
    """Counts the requests that are inside one model. Used on the event loop's thread only."""

    def __init__(
        self,
        queue: int,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Let at most `queue` requests wait, besides those that have a slot (set `slots`).

        deadline: seconds that a request has; no more wait than can be captioned in time.
        """
        self.state = State.STARTING
        self.inside = 0
        self.slots = 0
        self._aside: Counter[Origin] = Counter()
        self._queue, self._deadline = queue, deadline
        self._clock, self._rate = clock, DrainRate(clock)
        self._recent = RecentClients(clock)
        self._in_engine = 0  # rows
        self._preparing: Counter[str] = Counter()  # requests before the engine, by client

    @contextmanager
    def enter(self, client: str = "") -> Iterator[None]:
        """Hold a place while a request is served; raises what `check` raises."""
        self.check(client)
        self.inside += 1
        self._preparing[client] += 1
        try:
            yield
        finally:
            self.inside -= 1
            self._preparing[client] -= 1
            if not self._preparing[client]:
                del self._preparing[client]

    def check(self, client: str = "") -> None:
        """Raise NotServing or QueueFull if there is no place for a request of this client.

        Half of the queue is one client's at most before the engine, as soon as another comes, too.
        """
        if self.state is not State.READY:
            raise NotServing(f"the server is {self.state}: try again soon, or another instance")
        self._recent.note(client)
        alone = self._recent.within(_OLD_SECONDS) == {client}
        if self.inside >= self._most:
            raise QueueFull("the queue is full: try again later", self._seconds_to_drain())
        if not alone and self._preparing[client] >= max(self.slots, self._most // 2):
            raise QueueFull(
                "half of the queue is yours, and others wait, too: try again later",
                self._seconds_to_drain(),
            )

    @contextmanager
    def engine(self, client: str = "", rows: int = 1) -> Iterator[None]:
        """A request that was let in has its pixels, and waits for the engine alone.

        rows: slots that it takes there.
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

    @contextmanager
    def aside(self, request: Origin) -> Iterator[None]:
        """A request that was let in waits for something else than the engine: it is not inside.

        Raises QueueFull if too many do, of all clients or of its own. It may be given several times
        at once, for each frame of a clip.
        """
        first = request not in self._aside
        of_client = sum(other.client == request.client for other in self._aside)
        left = ASIDE - (len(self._aside) - of_client)  # by others, of which half may be one's own
        if first and (len(self._aside) >= ASIDE or of_client >= -(-left // 2)):
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
    def accepted(self) -> int:
        """Requests that were let in and are not over, those that stepped aside included."""
        return self.inside + len(self._aside)

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

    def _seconds_to_drain(self) -> int:
        """How long the requests inside will take, from 1 to a minute."""
        return min(_LONGEST_WAIT, max(1, math.ceil(self.inside * (self._rate.seconds or 0))))
