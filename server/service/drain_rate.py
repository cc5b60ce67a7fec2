"""How fast an engine takes requests in, by those that had to wait for it."""

from collections import deque
from collections.abc import Callable

_RECENT = 64  # completions that the drain rate is taken from
_ENOUGH = 4  # to go by
_OLD_SECONDS = 60.0  # after which what was seen says nothing any more


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
