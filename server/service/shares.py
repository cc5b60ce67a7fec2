"""What of a model's slots one client may have while others want some, too.

A request may take several slots, and hold them for long: without a bound few requests of one
client would keep all the others waiting.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from runtime.request import Priority


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for others of its client."""

    client: str
    rows: int
    batch: bool
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class Shares:
    """Counts slots by client. Used on the event loop's thread only."""

    def __init__(self) -> None:
        """slots: set it; half of them are one client's while others are here."""
        self.slots = 0
        self._taken: Counter[str] = Counter()
        self._waiting: list[_Waiting] = []  # in the order of their coming, interactive ones first

    @asynccontextmanager
    async def take(self, client: str, rows: int, priority: Priority) -> AsyncIterator[None]:
        """Hold so many slots; wait for requests of the same client if it has its share."""
        me = _Waiting(client, rows, priority is Priority.BATCH)
        self._waiting.append(me)
        self._waiting.sort(key=lambda each: each.batch)
        try:
            self._admit()
            await me.turn.wait()
            yield
        finally:
            if me.turn.is_set():
                self._taken[client] -= rows
                self._taken += Counter()  # without those that have none
            else:
                self._waiting.remove(me)
            self._admit()

    def _admit(self) -> None:
        """Let in who has its turn; nobody passes another of its own client and priority."""
        alone = len({*self._taken, *(each.client for each in self._waiting)}) == 1
        blocked: set[str] = set()
        left = []
        for each in self._waiting:
            mine = self._taken[each.client]
            fits = not mine or alone or mine + each.rows <= self.slots // 2
            if each.client in blocked or not fits:
                blocked.add(each.client)
                left.append(each)
            else:
                self._taken[each.client] += each.rows
                each.turn.set()
        self._waiting = left
