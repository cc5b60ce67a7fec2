"""Token buckets by client: a burst, and a rate per second.

They are for costs that can't be refused: bytes of incoming bodies, and refusals themselves, each of
which takes a front-end as long as a request that is served.
"""

from collections import OrderedDict
from collections.abc import Callable
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
        together: bool = False,
    ) -> None:
        """rate: tokens that a client gains a second, up to `burst`, with which it begins. longest:
        most seconds in which a client's debt is repaid. together: clients that spend within the
        same second divide rate and burst among them.
        """
        self._rate, self._burst, self._clock, self._longest = rate, burst, clock, longest
        self._together = together
        self._spent: OrderedDict[str, float] = OrderedDict()  # time of each client's last use
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and as of when

    def spend(self, client: str, amount: float) -> float:
        """Take tokens; return the seconds that the client has to wait for them."""
        if self._together:
            amount *= self._spending(client)
        return min(self._longest, max(0.0, -self._change(client, -amount) / self._rate))

    def _spending(self, client: str) -> int:
        """Number of clients that spent some within the last second, including this one."""
        now = self._clock()
        self._spent[client] = now
        self._spent.move_to_end(client)
        while next(iter(self._spent.values())) < now - _TOGETHER_SECONDS:
            self._spent.popitem(last=False)
        return len(self._spent)

    def owed(self, client: str) -> float:
        """Seconds until the client's debt is repaid; 0 without one."""
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
