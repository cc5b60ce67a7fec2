"""Whose turn it is, by what each client has had (start-time fair queueing)."""

from collections import OrderedDict

_CLIENTS = 1024  # that are remembered


class ClientClocks:
    """Each client has a clock, which goes on by what it takes, and the queue has one, which goes on
    by each client's share of that. No client's stands behind the queue's: nobody saves up.
    """

    def __init__(self) -> None:
        self._had: OrderedDict[str, float] = OrderedDict()
        self._now = 0.0

    def of(self, client: str) -> float:
        """Its clock; the client whose clock is least is next."""
        return max(self._now, self._had.get(client, 0.0))

    def begin(self, client: str) -> None:
        """It takes something from now on."""
        self._had[client] = self.of(client)

    def charge(self, client: str, took: float, present: int) -> None:
        """It has had so much, in any unit, the same for all; so many clients want some."""
        self._had[client] = self._had.get(client, self._now) + took
        # Time goes on for all, or those who are new all the time would always be before the others.
        self._now += took / present
        self._had.move_to_end(client)
        if len(self._had) > _CLIENTS:
            self._had.popitem(last=False)
