"""What of the slots one client may have while others want some, too.

A request may take several slots, and hold them for long: without a bound few requests of one
client, or of a few, would keep all the others waiting.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic

from runtime.request import Priority
from server.fairness.client_clocks import ClientClocks
from server.fairness.present_clients import PresentClients

_ELSEWHERE_SECONDS = 0.02  # until those who wait for other front-ends look again
_AHEAD = 2  # that may wait in an engine of few slots
_LEARNING = 0.1  # of what a request takes usually


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its turn."""

    client: str
    rows: int
    batch: bool
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class SlotShares:
    """Hands out slots of the engines that share a device, by clients' clocks, which go on by slots
    times seconds. Used on the event loop's thread only.

    While others are here, or were a moment ago, one client has its share at most, so that between
    two requests of theirs it does not take all; one request may be larger. Half as many as there
    are slots wait in the engine, so that it encodes several together; but those of several slots
    wait here, because the engine keeps its order: all others would wait for so many to be free.
    """

    def __init__(
        self, clients: PresentClients | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        """clients: those of all front-ends that want slots of this device.

        slots, models: set them; slots are those of this front-end. With several models a share is
        smaller: a request of another model keeps all cores busy, too, which one in the same batch
        does not.
        """
        self.slots, self.models = 0, 1
        self._clients, self._clock = clients or PresentClients(clock=clock), clock
        self._clocks = ClientClocks()
        self._taken: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()  # of those, by requests that let others pass
        # By client and whether they let others pass, each in the order of their coming.
        self._waiting: dict[tuple[str, bool], deque[_Waiting]] = {}
        self._looking = False
        self._usual = 0.0  # slots times seconds of a request

    @asynccontextmanager
    async def take(self, client: str, rows: int, priority: Priority) -> AsyncIterator[None]:
        """Hold so many slots, once it is this request's turn.

        One that is taken back counts as what is usual, at least: the engine has encoded its image
        all the same, and ends its step with it.
        """
        me = _Waiting(client, rows, priority is Priority.BATCH)
        self._waiting.setdefault((client, me.batch), deque()).append(me)
        self._clients.came(client)
        began, whole = 0.0, False
        try:
            self._admit()
            self._look_again()
            await me.turn.wait()
            began = self._clock()
            yield
            whole = True
        finally:
            if me.turn.is_set():
                self._take(me, -rows)
                took = rows * (self._clock() - began) if began else 0.0
                if whole:
                    self._usual += _LEARNING * (took - self._usual)
                else:
                    took = max(took, self._usual)
                self._clocks.charge(client, took, len(self._present | {client}))
            else:
                self._forget(me)
            if client not in self._present:
                self._clients.left(client)
            self._look_again()
            self._admit()

    def _take(self, each: _Waiting, rows: int) -> None:
        for taken in (self._taken, self._batch) if each.batch else (self._taken,):
            taken[each.client] += rows
            if not taken[each.client]:
                del taken[each.client]
        self._clients.has(each.client, self._taken[each.client])

    def _forget(self, each: _Waiting) -> None:
        line = self._waiting[each.client, each.batch]
        line.remove(each)
        if not line:
            del self._waiting[each.client, each.batch]

    @property
    def _present(self) -> set[str]:
        """Clients that have slots, or wait for some."""
        return {*self._taken, *(client for client, _ in self._waiting)}

    def _look_again(self) -> None:
        """Once whoever left has been away for long enough, who waits may be alone."""
        if self._waiting:
            asyncio.get_running_loop().call_later(self._clients.linger, self._admit)

    def _look_elsewhere(self) -> None:
        """A client may have got slots back in another front-end, of which nobody tells."""
        self._looking = False
        self._admit()

    def _admit(self) -> None:
        """Let in who has its turn; nobody passes another of its own client and priority."""
        if not self._waiting:
            return
        clients, elsewhere = self._clients.count(), self._clients.elsewhere()
        ahead = max(_AHEAD, self.slots // 2)
        slots, all_ = (self._clients.front_ends * n for n in (self.slots, self.slots + ahead))
        share = (all_ if self.models == 1 else slots) // clients
        most = all_ if clients == 1 else max(1, min(slots // 2, share))
        if not self._looking and any(client in elsewhere for client, _ in self._waiting):
            self._looking = True
            asyncio.get_running_loop().call_later(_ELSEWHERE_SECONDS, self._look_elsewhere)
        while (next_ := self._next(most, elsewhere)) is not None:
            # The engine lets those of high priority pass: what others have there is no matter.
            taken = self._taken.total() - (0 if next_.batch else self._batch.total())
            room = self.slots + (ahead if next_.rows == 1 or clients == 1 else 0)
            if taken and taken + next_.rows > room:
                return
            self._forget(next_)
            self._take(next_, next_.rows)
            self._clocks.begin(next_.client)
            next_.turn.set()

    def _next(self, most: int, elsewhere: Counter[str]) -> _Waiting | None:
        """The request whose turn it is, of those whose client has less than its share."""
        first = (
            line[0]
            for (client, batch), line in self._waiting.items()
            if not (batch and (client, False) in self._waiting)
        )
        fits = (each for each in first if self._fits(each, most - elsewhere[each.client], most))
        return min(fits, key=self._turn, default=None)

    def _fits(self, each: _Waiting, left: int, most: int) -> bool:
        """left: of the most that a client may have in all front-ends, what it has in no other."""
        mine = self._taken[each.client] - (0 if each.batch else self._batch[each.client])
        return mine + each.rows <= left or (not mine and left == most)

    def _turn(self, each: _Waiting) -> tuple[bool, float]:
        """Those of high priority first, then by clocks; of what a client has now, what is usual."""
        running = self._taken[each.client] * self._usual
        return each.batch, self._clocks.of(each.client) + running
