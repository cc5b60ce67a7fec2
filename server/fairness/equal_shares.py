"""A fair queue whose clients have equal shares of the places."""

from collections import Counter
from collections.abc import Collection, Iterable

from server.fairness.fair_queue import FairQueue


class EqualShares(FairQueue):
    """Leaves one share to the next client, and calls places back from those with more."""

    def __init__(self, places: int) -> None:
        super().__init__(places)
        self._called: Counter[str] = Counter()  # of a client's places, called back

    def give(self, client: str, took: float = 1.0, called: bool = False) -> None:
        """See FairQueue. called: the place was called back."""
        if called:
            self._called[client] -= 1
            self._called += Counter()  # drops zero counts
        super().give(client, took)

    def _share(self, *more: str) -> int:
        """Equal share of the clients present, and of `more`, with one left over."""
        return max(1, self._places // (len({*more, *self._present}) + 1))

    def _with_room(self, clients: Collection[str]) -> Iterable[str]:
        share = self._share(*clients)
        return (client for client in clients if self._held[client] < share)

    def call_back(self, client: str, newcomer: str | None = None) -> bool:
        """Whether no place is free, and one of this client is due to others that wait, which have
        fewer and may have more. If so, it counts as called back until it is given.

        newcomer: client of a request that is about to wait, too.
        """
        if self._free:
            return False
        more = () if newcomer is None else (newcomer,)
        waiting = Counter({other: len(turns) for other, turns in self._waiting.items()})
        waiting.update(more)
        left, share = self._held[client] - self._called[client], self._share(*more)
        due = sum(
            min(count, max(0, share - self._held[other]))
            for other, count in waiting.items()
            if self._held[other] < left
        )
        if due <= self._called.total():
            return False
        self._called[client] += 1
        return True
