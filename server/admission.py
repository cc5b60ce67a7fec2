"""Who may come in: the server's state, and bounds on the requests inside and on their bytes."""

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from runtime.errors import VignetteError

_RECENT = 64  # completions that the drain rate is taken from


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


class Admission:
    """Counts the requests that are inside. Used on the event loop's thread only."""

    def __init__(self, queue: int, most_bytes: int) -> None:
        """Let at most `queue` requests wait, besides those that have a slot (set `slots`).

        most_bytes: of all bodies together, those that are still coming in too.
        """
        self.state = State.STARTING
        self.inside = 0
        self.slots = 0
        self.held_bytes = 0
        self._queue, self._most_bytes = queue, most_bytes
        self._completed: deque[float] = deque(maxlen=_RECENT)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Hold a place while a request is served; raises NotServing or QueueFull."""
        if self.state is not State.READY:
            raise NotServing(f"the server is {self.state}: try again soon, or another instance")
        if self.inside >= self.slots + self._queue:
            raise QueueFull("the queue is full: try again later", self._seconds_to_drain())
        self.inside += 1
        try:
            yield
            self._completed.append(time.monotonic())
        finally:
            self.inside -= 1

    def hold(self, size: int) -> None:
        """Count bytes of a body in; raises QueueFull if there are too many already."""
        if self.held_bytes + size > self._most_bytes:
            raise QueueFull(
                "too many bytes are being sent at once: try again later", self._seconds_to_drain()
            )
        self.held_bytes += size

    def let_go(self, size: int) -> None:
        """Count them out again."""
        self.held_bytes -= size

    def _seconds_to_drain(self) -> int:
        """How long the requests inside will take at the rate of the last completions."""
        if len(self._completed) < 2:
            return 1
        span = time.monotonic() - self._completed[0]
        return max(1, math.ceil(self.inside * span / len(self._completed)))
