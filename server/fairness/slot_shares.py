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
from server.fairness.recent_clients import RecentClients

_LINGER_SECONDS = 2.0
_AHEAD = 2  # that may wait in an engine of few slots


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for others of its client."""

    client: str
    rows: int
    batch: bool
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class SlotShares:
    """Counts slots by client. Used on the event loop's thread only."""

    def __init__(self, linger: float = _LINGER_SECONDS) -> None:
        """slots: set it; half of them are one client's while others are here, or were a moment ago:
        between two requests of theirs it must not take all. Who is alone has all, and half as many
        wait in the engine, so that it encodes several together: whoever comes is behind those.
        """
        self.slots = 0
        self._linger = linger
        self._left = RecentClients()
        self._taken: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()  # of those, by requests that let others pass
        self._waiting: list[_Waiting] = []  # in the order of their coming, interactive ones first

    @asynccontextmanager
    async def take(self, client: str, rows: int, priority: Priority) -> AsyncIterator[None]:
        """Hold so many slots; wait for requests of the same client if it has its share."""
        me = _Waiting(client, rows, priority is Priority.BATCH)
        self._waiting.append(me)
        self._waiting.sort(key=lambda each: each.batch)
        try:
            self._admit()
            self._look_again()
            await me.turn.wait()
            yield
        finally:
            if me.turn.is_set():
                self._take(me, -rows)
            else:
                self._waiting.remove(me)
            self._left.note(client)
            self._look_again()
            self._admit()

    def _take(self, each: _Waiting, rows: int) -> None:
        for taken in (self._taken, self._batch) if each.batch else (self._taken,):
            taken[each.client] += rows
            if not taken[each.client]:
                del taken[each.client]

    def _look_again(self) -> None:
        """Once whoever left has been away for long enough, who waits may be alone."""
        if self._waiting:
            asyncio.get_running_loop().call_later(self._linger, self._admit)

    def _admit(self) -> None:
        """Let in who has its turn; nobody passes another of its own client and priority."""
        if not self._waiting:
            return
        lately = self._left.within(self._linger)
        alone = len({*self._taken, *lately, *(each.client for each in self._waiting)}) == 1
        blocked: set[str] = set()
        left = []
        for each in self._waiting:
            mine, most = self._taken[each.client], self.slots // 2
            if alone:
                most = self.slots + max(_AHEAD, self.slots // 2)
                mine -= 0 if each.batch else self._batch[each.client]  # it passes those there
            fits = not mine or mine + each.rows <= most
            if each.client in blocked or not fits:
                blocked.add(each.client)
                left.append(each)
            else:
                self._take(each, each.rows)
                each.turn.set()
        self._waiting = left
