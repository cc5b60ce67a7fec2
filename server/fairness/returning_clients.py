"""Clients that send one request after the other: when one is answered, the next comes at once."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from time import monotonic


class ReturningClients:
    """Tells which clients are expected back. Used on the event loop's thread only."""

    def __init__(self, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        """seconds: within which a client returns, and for which it is expected then."""
        self._seconds, self._clock = seconds, clock
        self._left: OrderedDict[str, tuple[float, bool]] = OrderedDict()  # when; whether to expect
        self._returned: set[str] = set()

    def came(self, client: str) -> None:
        """Note a request."""
        self._forget()
        if self._left.pop(client, None) is not None:
            self._returned.add(client)

    def left(self, client: str) -> None:
        """Note that a client has no more requests here."""
        self._left[client] = self._clock(), client in self._returned
        self._left.move_to_end(client)
        self.gone(client)
        self._forget()

    def gone(self, client: str) -> None:
        """Note that a client has given up its last request."""
        self._returned.discard(client)

    def expected(self) -> Iterator[tuple[str, float]]:
        """Clients that returned the last time, and the seconds for which each is expected."""
        self._forget()
        now = self._clock()
        return (
            (client, at + self._seconds - now) for client, (at, back) in self._left.items() if back
        )

    def _forget(self) -> None:
        late = self._clock() - self._seconds
        while self._left and next(iter(self._left.values()))[0] <= late:
            self._left.popitem(last=False)
