"""How fast an engine drains its queue, measured on requests that had to wait."""

from collections import deque
from collections.abc import Callable

_RECENT = 64  # completions that the rate is averaged over
_ENOUGH = 4  # completions for an estimate
_OLD_SECONDS = 60.0  # after which a completion no longer counts


class DrainRate:
    """Seconds the engine takes per request while others wait for a slot.

    Idle times do not count, nor completions of more than a minute ago: the load changes.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # when, and seconds taken
        self.expected: float | None = None  # seconds, measured before the first request
        self._since: float | None = None  # when the last request was completed, or waiting began

    def waiting(self) -> None:
        """Note that a request waits for a slot."""
        if self._since is None:
            self._since = self._clock()

    def completed(self) -> None:
        """Note that a request was completed."""
        if self._since is not None:
            now = self._clock()
            self._seen.append((now, now - self._since))
            self._since = now

    def idle(self) -> None:
        """Note that no request waits any more."""
        self._since = None

    @property
    def seconds(self) -> float | None:
        """Mean seconds per request; `expected`, perhaps None, while too few were completed."""
        while self._seen and self._clock() - self._seen[0][0] > _OLD_SECONDS:
            self._seen.popleft()
        if len(self._seen) < _ENOUGH:
            return self.expected
        return sum(seconds for _, seconds in self._seen) / len(self._seen)
