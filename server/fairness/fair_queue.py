"""A semaphore whose waiters are served by start-time fair queueing across clients."""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from time import monotonic

from server.fairness.client_clocks import ClientClocks
from server.fairness.recent_clients import RecentClients

_PRESENT_SECONDS = 1.0  # for which a client counts as present after it came


class FairQueue:
    """Grants places in the order of `ClientClocks`; of equal clocks, the client that waits longest
    is next. Used on the event loop's thread only.
    """

    def __init__(
        self, places: int, beside: int | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        """beside: most places of one client while others are present."""
        self._places = self._free = places
        self._beside = beside or places
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._clocks = ClientClocks()
        self._recent = RecentClients(clock)

    async def take(self, client: str) -> None:
        """Wait for a place."""
        self._came(client)
        if self._free and client in self._with_room([client]) and not self._keep_from(client):
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
                if client not in self._present:
                    self._gave_up(client)
            raise

    def give(self, client: str, took: float = 1.0) -> None:
        """Release a client's place, for the client that is next. took: service, in any one unit."""
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._charge(client, took)
        self._free += 1
        if client not in self._present:
            self._left(client)
        self._grant()

    @property
    def _present(self) -> set[str]:
        """Clients that hold or wait for places."""
        return {*self._held, *self._waiting}

    def _with_room(self, clients: Collection[str]) -> Iterable[str]:
        """Those of the clients that may have another place."""
        recent = self._recent.within(_PRESENT_SECONDS)
        return (
            each for each in clients
            if self._held[each] < (self._places if recent <= {each} else self._beside)
        )  # fmt: skip

    def _charge(self, client: str, took: float) -> None:
        self._clocks.charge(client, took, len({client, *self._present}))

    def _grant(self) -> None:
        """Give free places to waiting clients."""
        while self._free and (next_ := self._next()) is not None and not self._keep_from(next_):
            turns = self._waiting[next_]
            turns.popleft().set_result(None)
            if not turns:
                del self._waiting[next_]
            self._begin(next_)

    def _begin(self, client: str) -> None:
        self._free -= 1
        self._held[client] += 1
        self._clocks.begin(client)

    def _next(self) -> str | None:
        """The waiting client that is next, or None."""
        for client, turns in list(self._waiting.items()):
            while turns and turns[0].done():
                turns.popleft()  # cancelled
            if not turns:
                del self._waiting[client]
        return min(self._with_room(self._waiting), key=self._clocks.of, default=None)

    # --- For queues that are kept otherwise -------------------------------------------------------

    def _came(self, client: str) -> None:
        """Note that a client asks for a place."""
        self._recent.note(client)

    def _left(self, client: str) -> None:
        """Note that a client gave back its last place and waits for none."""

    def _gave_up(self, client: str) -> None:
        """Note that a client without a place no longer waits for one."""

    def _keep_from(self, client: str) -> bool:
        """Whether to keep the free place from the client that is next; `_grant` is to be called
        later then.
        """
        return False
