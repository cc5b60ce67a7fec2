"""A bounded set of digests with expiry times."""

import time
from collections import OrderedDict
from collections.abc import Callable

_MOST = 1024


class Remembered:
    """Digests with expiry times in `time.monotonic`, which all processes of a machine share."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """seconds: default lifetime of a digest."""
        self._seconds, self._clock = seconds, clock
        self._until: OrderedDict[str, float] = OrderedDict()

    def add(self, digest: str, until: float | None = None) -> float:
        """Add a digest, or extend its lifetime; return its expiry time."""
        until = self._clock() + self._seconds if until is None else until
        self._until[digest] = max(until, self._until.pop(digest, 0.0))
        while len(self._until) > _MOST:
            self._until.popitem(last=False)
        return self._until[digest]

    def expired(self, digest: str) -> bool:
        """Whether a digest was added and has expired; it is then removed."""
        over = digest in self._until and self._until[digest] <= self._clock()
        if over:
            del self._until[digest]
        return over

    def items(self) -> dict[str, float]:
        """All digests that have not expired, with their expiry times."""
        return {d: until for d, until in self._until.items() if until > self._clock()}

    def __contains__(self, digest: str) -> bool:
        return self._until.get(digest, 0.0) > self._clock()

    def __bool__(self) -> bool:
        return bool(self._until)
