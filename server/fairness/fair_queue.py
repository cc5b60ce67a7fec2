"""A semaphore whose waiters are served by start-time fair queueing across clients."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from time import monotonic

from server.fairness.client_clocks import ClientClocks
from server.fairness.recent_clients import RecentClients
from server.fairness.returning_clients import ReturningClients

_PRESENT_SECONDS = 1.0  # for which a client counts as present after it came


class FairQueue:
    """Grants places in the order of `ClientClocks`; of equal clocks, the client that waits longest
    is next. Used on the event loop's thread only.
    """

    def __init__(
        self,
        places: int,
        beside: int | None = None,
        spare: bool = False,
        patience: float = 0.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """beside: most places of one client while others are present. spare: clients have equal
        shares of the places, and one share is left to the next client. patience: seconds for which
        a queue of one place, if `took` is in seconds, keeps it for a client that has just left and
        is expected back, from those that had so much more; else one that sends one request after
        the other would wait for each of theirs. It is charged for that time.
        """
        assert not patience or places == 1
        self._places = self._free = places
        self._beside, self._spare = beside or places, spare
        self._held: Counter[str] = Counter()
        self._called: Counter[str] = Counter()  # of those, called back
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._clocks = ClientClocks()
        self._recent = RecentClients(clock)
        self._returning = ReturningClients(patience, clock)
        self._patience, self._clock = patience, clock
        # For whom the free place is kept, since when, and the look at it later.
        self._kept: tuple[str, float, asyncio.TimerHandle] | None = None

    async def take(self, client: str) -> None:
        """Wait for a place."""
        self._recent.note(client)
        self._returning.came(client)
        if self._free and self._room(client, self._share(client)) and not self._awaited(client):
            self._begin(client)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(client, 0)  # the place was granted at the same moment
            elif (turns := self._waiting.get(client)) and turn in turns:
                turns.remove(turn)
                if not turns:
                    del self._waiting[client]
                if client not in self._held and client not in self._waiting:
                    self._returning.gone(client)
            raise

    def give(self, client: str, took: float = 1.0, called: bool = False) -> None:
        """Release a client's place, for the client that is next. took: service, in any one unit.
        called: the place was called back.
        """
        if called:
            self._called[client] -= 1
            self._called += Counter()  # drops zero counts
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._clocks.charge(client, took, len({client, *self._held, *self._waiting}))
        self._free += 1
        if client not in self._held and client not in self._waiting:
            self._returning.left(client)
        self._grant()

    def _grant(self) -> None:
        """Give free places to waiting clients; if they are kept for others, look again later."""
        self._end_keeping()
        while self._free and (next_ := self._next()) is not None:
            if awaited := self._awaited(next_):
                client, seconds = awaited
                later = asyncio.get_running_loop().call_later(seconds, self._grant)
                self._kept = client, self._clock(), later
                return
            turns = self._waiting[next_]
            turns.popleft().set_result(None)
            if not turns:
                del self._waiting[next_]
            self._begin(next_)

    def _awaited(self, client: str) -> tuple[str, float] | None:
        """The other client for which the place is kept from this one, and the seconds left."""
        much = self._clocks.of(client) - self._patience
        others = (each for each in self._returning.expected() if self._clocks.of(each[0]) < much)
        return min(others, key=lambda each: self._clocks.of(each[0]), default=None)

    def _end_keeping(self) -> None:
        """Charge the client for which the place was kept, as if it had held it."""
        if self._kept is not None:
            client, since, later = self._kept
            later.cancel()
            self._kept = None
            present = len({client, *self._held, *self._waiting})
            self._clocks.charge(client, self._clock() - since, present)

    def _begin(self, client: str) -> None:
        self._end_keeping()
        self._free -= 1
        self._held[client] += 1
        self._clocks.begin(client)

    def _share(self, *more: str) -> int:
        """Equal share of the clients present, and of `more`, with one left over."""
        return max(1, self._places // (len({*more, *self._held, *self._waiting}) + 1))

    def _room(self, client: str, share: int) -> int:
        """How many more places a client may have."""
        most = self._places
        if self._spare:
            most = share
        elif not self._recent.within(_PRESENT_SECONDS) <= {client}:
            most = self._beside
        return max(0, most - self._held[client])

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
            min(count, self._room(other, share))
            for other, count in waiting.items()
            if self._held[other] < left
        )
        if due <= self._called.total():
            return False
        self._called[client] += 1
        return True

    def _next(self) -> str | None:
        """The waiting client that is next, or None."""
        for client, turns in list(self._waiting.items()):
            while turns and turns[0].done():
                turns.popleft()  # cancelled
            if not turns:
                del self._waiting[client]
        share = self._share()
        could = (client for client in self._waiting if self._room(client, share))
        return min(could, key=self._clocks.of, default=None)
