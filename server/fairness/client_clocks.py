"""Virtual time for start-time fair queueing across clients."""

from collections import OrderedDict

_CLIENTS = 1024  # most clients remembered


class ClientClocks:
    """Virtual time per client, advanced by the service it receives and never behind the queue's, so
    that idle clients gain no credit. The queue's advances by the service per client present.
    """

    def __init__(self) -> None:
        self._had: OrderedDict[str, float] = OrderedDict()
        self._now = 0.0

    def of(self, client: str) -> float:
        """A client's virtual time; the client with the least is next."""
        return max(self._now, self._had.get(client, 0.0))

    def begin(self, client: str) -> None:
        """Note that a client is served from now on."""
        self._had[client] = self.of(client)

    def charge(self, client: str, took: float, present: int) -> None:
        """Add service that a client received, in any one unit. present: clients that want some."""
        self._had[client] = self._had.get(client, self._now) + took
        # The queue's time advances, or ever-new clients would always come before the others.
        self._now += took / present
        self._had.move_to_end(client)
        if len(self._had) > _CLIENTS:
            self._had.popitem(last=False)
