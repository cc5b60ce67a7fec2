"""Places that clients take in turns: one with many requests waits behind itself."""

import asyncio
from collections import OrderedDict, deque


class Turns:
    """A number of places. Used on the event loop's thread only."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, client: str) -> None:
        """Wait for a place: the clients that wait get one each in turn, in order for each."""
        if self._free:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()  # it came at the same moment
            raise

    def give(self) -> None:
        """A place is free again: for the client whose turn it is."""
        while self._waiting:
            client, turns = self._waiting.popitem(last=False)
            while turns:
                turn = turns.popleft()
                if turn.done():
                    continue  # who waited has gone
                if turns:
                    self._waiting[client] = turns  # behind the others
                turn.set_result(None)
                return
        self._free += 1
