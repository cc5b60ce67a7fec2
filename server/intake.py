"""How fast large bodies are taken in, so that receiving them leaves time for captioning."""

import asyncio
from collections.abc import Awaitable

_FREE = 256 * 1024  # bytes of each body, which most images do not reach
_RATE = 100e6  # bytes a second beyond that, of all bodies together: a quarter of a slow core
_BURST = 64e6
_STEP = 2e6  # bytes that come in between two waits


class Intake:
    """The bytes that may come in now. Used on the event loop's thread only."""

    def __init__(self, rate: float = _RATE, burst: float = _BURST) -> None:
        self._rate, self._burst = rate, burst
        self._credit, self._at = burst, 0.0

    def take(self, received: int, size: int) -> Awaitable[None] | None:
        """What to wait for before more of a body is read than the `received` bytes that are here.

        size: of those that came last.
        """
        if received <= _FREE:
            return None
        now = asyncio.get_running_loop().time()
        self._credit = min(self._burst, self._credit + (now - self._at) * self._rate) - size
        self._at = now
        late = self._credit < -_STEP
        return asyncio.sleep(-self._credit / self._rate) if late else None
