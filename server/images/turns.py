"""Places that clients take in turns: one with many requests waits behind itself."""

import asyncio
from collections import Counter, OrderedDict, deque


class Turns:
    """A number of places. Used on the event loop's thread only."""

    def __init__(self, places: int, each: int | None = None) -> None:
        """each: places that one client has at most at a time."""
        self._free, self._each = places, each or places
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, client: str) -> None:
        """Wait for a place: the clients that wait get one each in turn, in order for each."""
        if self._free and self._held[client] < self._each:
            self._free -= 1
            self._held[client] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(client)  # it came at the same moment
            raise

    def give(self, client: str) -> None:
        """A place of this client's is free again: for the one whose turn it is."""
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        for waiting, turns in list(self._waiting.items()):
            while turns and turns[0].done():
                turns.popleft()  # who waited has gone
            if not turns:
                del self._waiting[waiting]
            elif self._held[waiting] < self._each:
                turn = turns.popleft()
                self._waiting.move_to_end(waiting)  # behind the others
                if not turns:
                    del self._waiting[waiting]
                self._held[waiting] += 1
                turn.set_result(None)
                return
        self._free += 1
