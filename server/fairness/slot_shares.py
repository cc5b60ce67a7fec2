"""Bounds the slots of one client while others want some, too.

A request may take several slots, and hold them for long: without a bound, a few requests of one or
a few clients would keep all others waiting.
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

_ELSEWHERE_SECONDS = 0.02  # until slots that clients hold in other front-ends are counted again
_AHEAD = 2  # requests that may wait in an engine of few slots
_LEARNING = 0.1  # weight of a new value in the usual cost of a request


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for its turn."""

    client: str
    rows: int
    batch: bool
    turn: asyncio.Event = field(default_factory=asyncio.Event)


class SlotShares:
    """Hands out slots of the engines that share a device, in the order of `ClientClocks`, which
    advance by slots times seconds. Used on the event loop's thread only.

    While other clients are present, or were a moment ago, one client has its share at most, so that
    it does not take all slots between two of their requests; one request may be larger. Half as
    many requests as slots wait in the engine, so that it encodes several together; but requests of
    several slots wait here, because the engine keeps its order: all others would wait with them.
    """

    def __init__(
        self, clients: PresentClients | None = None, clock: Callable[[], float] = monotonic
    ) -> None:
        """clients: those of all front-ends that want slots of this device.

        slots, models: to be set; slots are those of this front-end. With several models a share is
        smaller: a request of another model keeps all cores busy, too, unlike one in the same batch.
        """
        self.slots, self.models = 0, 1
        self._clients, self._clock = clients or PresentClients(clock=clock), clock
        self._clocks = ClientClocks()
        self._taken: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()  # of those, by batch requests
        # By client and whether of batch priority, each in the order of arrival.
        self._waiting: dict[tuple[str, bool], deque[_Waiting]] = {}
        self._looking = False
        self._usual = 0.0  # slots times seconds of a request

    @asynccontextmanager
    async def take(self, client: str, rows: int, priority: Priority) -> AsyncIterator[None]:
        """Hold `rows` slots, once it is the request's turn.

        A cancelled request is charged the usual cost at least: the engine has encoded its image all
        the same, and ends its step with it.
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
        """Clients that hold or wait for slots."""
        return {*self._taken, *(client for client, _ in self._waiting)}

    def _look_again(self) -> None:
        """Admit again after `linger` seconds, when a waiting client may be alone."""
        if self._waiting:
            asyncio.get_running_loop().call_later(self._clients.linger, self._admit)

    def _look_elsewhere(self) -> None:
        """Admit again: other front-ends don't tell when a client's slots are freed there."""
        self._looking = False
        self._admit()

    def _admit(self) -> None:
        """Admit requests whose turn it is; those of one client and priority keep their order."""
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
            # The engine lets interactive requests pass: for them, batch requests don't count.
            taken = self._taken.total() - (0 if next_.batch else self._batch.total())
            room = self.slots + (ahead if next_.rows == 1 or clients == 1 else 0)
            if taken and taken + next_.rows > room:
                return
            self._forget(next_)
            self._take(next_, next_.rows)
            self._clocks.begin(next_.client)
            next_.turn.set()

    def _next(self, most: int, elsewhere: Counter[str]) -> _Waiting | None:
        """The next request among those that fit their clients' shares, or None."""
        first = (
            line[0]
            for (client, batch), line in self._waiting.items()
            if not (batch and (client, False) in self._waiting)
        )
        fits = (each for each in first if self._fits(each, most - elsewhere[each.client], most))
        return min(fits, key=self._turn, default=None)

    def _fits(self, each: _Waiting, left: int, most: int) -> bool:
        """left: of the client's share, slots that it holds in no other front-end.

        Whatever it holds there, it has one slot here: those who wait here would starve.
        """
        mine = self._taken[each.client] - (0 if each.batch else self._batch[each.client])
        return mine + each.rows <= left or (not mine and (left == most or each.rows == 1))

    def _turn(self, each: _Waiting) -> tuple[bool, float]:
        """Order: interactive first, then by clock plus the usual cost of slots held now."""
        running = self._taken[each.client] * self._usual
        return each.batch, self._clocks.of(each.client) + running
