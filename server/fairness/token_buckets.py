"""Token buckets by client: a burst, and a rate per second.

They are for costs that can't be refused: bytes of incoming bodies, and refusals themselves, each of
which takes a front-end as long as a request that is served.
"""

from collections import OrderedDict
from collections.abc import Callable
from math import inf
from time import monotonic

_LONGEST_SECONDS = 5.0  # most that a client has to wait
_TOGETHER_SECONDS = 1.0
_CLIENTS = 1024  # most clients remembered


class TokenBuckets:
    """A token bucket for each client. Used on the event loop's thread only."""

    def __init__(
        self,
        rate: float,
        burst: float,
        clock: Callable[[], float] = monotonic,
        longest: float = _LONGEST_SECONDS,
        total: float = inf,
        least: float = 1.0,
    ) -> None:
        """rate: tokens that a client gains a second, up to `burst`, with which it begins. longest:
        most seconds in which a client's debt is repaid. total: rate of all clients, divided among
        those that spent `least` tokens within the last second: each token costs them more.
        """
        self._rate, self._burst, self._clock, self._longest = rate, burst, clock, longest
        self._total, self._least = total, least
        self._spent: OrderedDict[str, float] = OrderedDict()  # when each client spent `least`
        self._little: OrderedDict[str, float] = OrderedDict()  # tokens spent since then
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and as of when

    def spend(self, client: str, amount: float) -> float:
        """Take tokens; return the seconds that the client has to wait for them."""
        cost = amount * max(1.0, self._spending(client, amount) * self._rate / self._total)
        return min(self._longest, max(0.0, -self._change(client, -cost) / self._rate))

    def _spending(self, client: str, amount: float) -> int:
        """Number of clients that divide the total, at least 1."""
        now = self._clock()
        spent = self._little.pop(client, 0.0) + amount
        if spent >= self._least:
            self._spent[client] = now
            self._spent.move_to_end(client)
        else:
            self._little[client] = spent
            if len(self._little) > _CLIENTS:
                self._little.popitem(last=False)
        while self._spent and next(iter(self._spent.values())) < now - _TOGETHER_SECONDS:
            self._spent.popitem(last=False)
        return max(1, len(self._spent))

    def owed(self, client: str) -> float:
        """Seconds until the client's debt is repaid; 0 without one."""
        if client not in self._left:  # asking must not push others out of memory
            return 0.0
        return max(0.0, -self._change(client, 0) / self._rate)

    def earn(self, client: str, amount: float) -> None:
        """Give tokens back."""
        self._change(client, amount)

    def _change(self, client: str, change: float) -> float:
        now = self._clock()
        left, at = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate + change)
        self._left[client] = max(left, -self._longest * self._rate), now
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        return left
