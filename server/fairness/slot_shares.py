"""Bounds the slots of one client while others want some, too.

A request may take several slots, and hold them for long: without a bound, a few requests of one or
a few clients would keep all others waiting.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import NamedTuple

from runtime.request import Priority
from server.fairness.client_clocks import ClientClocks
from server.fairness.present_clients import PresentClients

_SOON_SECONDS = 0.1  # events within this are looked at again together
_ELSEWHERE_SECONDS = 0.02  # until slots that clients hold in other front-ends are counted again
_AHEAD = 2  # requests that may wait in an engine of few slots
_LEARNING = 0.1  # weight of a new value in the usual cost of a request


@dataclass(slots=True, eq=False)
class _Claim:
    """A request that waits for its slots, or has them.

    number: order of arrival. began: since when it has them, if its model serves. took: slots times
    seconds that it had them before.
    """

    client: str
    rows: int
    batch: bool
    model: str
    number: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    began: float = 0.0
    took: float = 0.0


class _Bounds(NamedTuple):
    """slots: that this front-end may use. ahead: requests beyond them that may wait in the engine.
    share: most slots of one client in all front-ends. alone: whether there is only one.
    """

    slots: int
    ahead: int
    share: int
    alone: bool


class SlotShares:
    """Hands out slots of the engines that share a device, in the order of `ClientClocks`, which
    advance by slots times seconds. Used on the event loop's thread only.

    While other clients are present, or were a moment ago, one client has its share at most, so that
    it does not take all slots between two of their requests; one request may be larger. Half as
    many requests as slots wait in the engine, so that it encodes several together; but requests of
    several slots wait here, because the engine keeps its order: all others would wait with them.

    While a model has no worker (`serve`), its requests hold no slots, and have no turn.
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
        # By client, whether of batch priority, and model, each in the order of arrival.
        self._waiting: dict[tuple[str, bool, str], deque[_Claim]] = {}
        self._holding: dict[_Claim, None] = {}
        self._down: set[str] = set()  # models without a worker
        self._numbers = itertools.count()
        self._looking = False
        self._looked_at = 0.0  # events until then are followed by `_admit`, in seconds of the loop
        self._usual = 0.0  # slots times seconds of a request

    @asynccontextmanager
    async def take(
        self, client: str, rows: int, priority: Priority, model: str = ""
    ) -> AsyncIterator[None]:
        """Hold `rows` slots, once it is the request's turn.

        A cancelled request is charged the usual cost at least: the engine has encoded its image all
        the same, and ends its step with it.
        """
        me = _Claim(client, rows, priority is Priority.BATCH, model, next(self._numbers))
        self._waiting.setdefault((client, me.batch, model), deque()).append(me)
        if model not in self._down:
            self._clients.came(client)
        began = whole = False
        try:
            self._admit()
            self._look_again()
            await me.turn.wait()
            began = True
            yield
            whole = True
        finally:
            if me.turn.is_set():
                if model not in self._down:
                    self._release(me)
                del self._holding[me]
                if whole:
                    self._usual += _LEARNING * (me.took - self._usual)
                took = me.took if whole else max(me.took if began else 0.0, self._usual)
                self._clocks.charge(client, took, len(self._present | {client}))
            else:
                self._forget(me)
            if model not in self._down and client not in self._present:
                self._clients.left(client)
            self._look_again()
            self._admit()

    def serve(self, model: str, serves: bool) -> None:
        """Set whether a model has a worker (at first, each has)."""
        if serves != (model in self._down):
            return
        affected = [each for each in self._holding if each.model == model]
        if serves:
            self._down.remove(model)
            for each in affected:
                self._hold(each)
        else:
            for each in affected:
                self._release(each)
            self._down.add(model)
        waiting = (client for client, _, name in self._waiting if name == model)
        for client in {*waiting, *(each.client for each in affected)}:
            if client in self._present:
                self._clients.came(client)
            else:
                self._clients.left(client)
        self._admit()

    def _hold(self, each: _Claim) -> None:
        self._take(each, each.rows)
        each.began = self._clock()

    def _release(self, each: _Claim) -> None:
        self._take(each, -each.rows)
        each.took += each.rows * (self._clock() - each.began)

    def _take(self, each: _Claim, rows: int) -> None:
        for taken in (self._taken, self._batch) if each.batch else (self._taken,):
            taken[each.client] += rows
            if not taken[each.client]:
                del taken[each.client]
        self._clients.has(each.client, self._taken[each.client])

    def _forget(self, each: _Claim) -> None:
        line = self._waiting[each.client, each.batch, each.model]
        line.remove(each)
        if not line:
            del self._waiting[each.client, each.batch, each.model]

    @property
    def _present(self) -> set[str]:
        """Clients that hold or wait for slots."""
        return {*self._taken, *(client for client, _, _ in self._wanted)}

    @property
    def _wanted(self) -> dict[tuple[str, bool, str], deque[_Claim]]:
        """The lines of models that serve."""
        if not self._down:
            return self._waiting
        return {key: line for key, line in self._waiting.items() if key[2] not in self._down}

    def _look_again(self) -> None:
        """Admit again after `linger` seconds, when a waiting client may be alone."""
        loop = asyncio.get_running_loop()
        if self._waiting and loop.time() >= self._looked_at:
            self._looked_at = loop.time() + _SOON_SECONDS
            loop.call_at(self._looked_at + self._clients.linger, self._admit)

    def _look_elsewhere(self) -> None:
        """Admit again: other front-ends don't tell when a client's slots are freed there."""
        self._looking = False
        self._admit()

    def _admit(self) -> None:
        """Admit requests whose turn it is; those of one client and priority keep their order."""
        if not self._wanted:
            return
        bounds, elsewhere = self._bounds(), self._clients.elsewhere()
        if not self._looking and any(client in elsewhere for client, _, _ in self._wanted):
            self._looking = True
            asyncio.get_running_loop().call_later(_ELSEWHERE_SECONDS, self._look_elsewhere)
        while (next_ := self._next(bounds.share, elsewhere)) is not None:
            # The engine lets interactive requests pass: for them, batch requests don't count.
            taken = self._taken.total() - (0 if next_.batch else self._batch.total())
            ahead = bounds.ahead if next_.rows == 1 or bounds.alone else 0
            if taken and taken + next_.rows > bounds.slots + ahead:
                return
            self._forget(next_)
            self._holding[next_] = None
            self._hold(next_)
            self._clocks.begin(next_.client)
            next_.turn.set()

    def _bounds(self) -> _Bounds:
        # Not all clients are published, if there are many.
        clients = max(self._clients.count(), len(self._present))
        front_ends = self._clients.front_ends
        slots = front_ends * self.slots
        all_ = slots + front_ends * max(_AHEAD, self.slots // 2)
        share = max(1, min(slots // 2, (all_ if self.models == 1 else slots) // clients))
        lent = slots // self._clients.active  # by front-ends without clients
        alone = clients == 1
        return _Bounds(lent, max(_AHEAD, lent // 2), all_ if alone else share, alone)

    def _next(self, share: int, elsewhere: Counter[str]) -> _Claim | None:
        """The next request among those that fit their clients' shares, or None."""
        first: dict[str, _Claim] = {}  # of each client
        for line in self._wanted.values():
            other = first.get(line[0].client)
            if other is None or (line[0].batch, line[0].number) < (other.batch, other.number):
                first[line[0].client] = line[0]
        fits = (
            each
            for each in first.values()
            if self._fits(each, share - elsewhere[each.client], share)
        )
        return min(fits, key=self._turn, default=None)

    def _fits(self, each: _Claim, left: int, share: int) -> bool:
        """left: of the client's share, slots that it holds in no other front-end.

        Whatever it holds there, it has one slot here: those who wait here would starve.
        """
        mine = self._taken[each.client] - (0 if each.batch else self._batch[each.client])
        return mine + each.rows <= left or (not mine and (left == share or each.rows == 1))

    def _turn(self, each: _Claim) -> tuple[bool, float, int]:
        """Order: interactive first, then by clock plus the usual cost of slots held now."""
        running = self._taken[each.client] * self._usual
        return each.batch, self._clocks.of(each.client) + running, each.number
