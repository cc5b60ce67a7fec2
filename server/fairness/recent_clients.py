"""Who was here a moment ago: a client without others around may have more."""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic


class RecentClients:
    """The last two clients and when each was noted, which is enough to know of another one."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._noted: OrderedDict[str, float] = OrderedDict()

    def note(self, client: str) -> None:
        """It has come, or left, now."""
        self._noted[client] = self._clock()
        self._noted.move_to_end(client)
        if len(self._noted) > 2:
            self._noted.popitem(last=False)

    def within(self, seconds: float) -> set[str]:
        """Those that were noted less than so many seconds ago."""
        now = self._clock()
        return {client for client, at in self._noted.items() if now - at < seconds}
