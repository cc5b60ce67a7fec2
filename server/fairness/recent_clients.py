"""Clients seen recently: a client that is alone may have more."""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic


class RecentClients:
    """The last two clients and when each was noted: enough to tell whether a client is alone."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._noted: OrderedDict[str, float] = OrderedDict()

    def note(self, client: str) -> None:
        """Note that a client has come, or left, now."""
        self._noted[client] = self._clock()
        self._noted.move_to_end(client)
        if len(self._noted) > 2:
            self._noted.popitem(last=False)

    def within(self, seconds: float) -> set[str]:
        """Clients noted less than `seconds` ago."""
        now = self._clock()
        return {client for client, at in self._noted.items() if now - at < seconds}
