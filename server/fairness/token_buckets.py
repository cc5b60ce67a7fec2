"""What a client may use of something that others need, too: so much at once, and so much a second.

It is for costs that can't be refused: bytes of bodies that come in, and refusals themselves, each
of which takes a front-end as long as a request that is served.
"""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

_LONGEST_SECONDS = 5.0  # that a client is let wait
_TOGETHER_SECONDS = 1.0
_CLIENTS = 1024  # that are remembered


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
        """rate: what a client gains a second, up to `burst`, with which it begins. longest: the
        seconds that what it used beyond that takes to be forgotten, at most. together: those who
        use some at a time divide rate and burst among them.
        """
        self._rate, self._burst, self._clock, self._longest = rate, burst, clock, longest
        self._together = together
        self._spent: OrderedDict[str, float] = OrderedDict()  # and when they did last
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # and when that was

    def spend(self, client: str, amount: float) -> float:
        """Use so much; returns the seconds that the client has to wait for it."""
        if self._together:
            amount *= self._spending(client)
        return min(self._longest, max(0.0, -self._change(client, -amount) / self._rate))

    def _spending(self, client: str) -> int:
        """Clients that have used some within the last second, this one included."""
        now = self._clock()
        self._spent[client] = now
        self._spent.move_to_end(client)
        while next(iter(self._spent.values())) < now - _TOGETHER_SECONDS:
            self._spent.popitem(last=False)
        return len(self._spent)

    def owed(self, client: str) -> float:
        """Seconds until the client has what it used beyond what it had."""
        return max(0.0, -self._change(client, 0) / self._rate)

    def earn(self, client: str, amount: float) -> None:
        """Give so much back."""
        self._change(client, amount)

    def _change(self, client: str, change: float) -> float:
        now = self._clock()
        left, at = self._left.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - at) * self._rate + change)
        self._left[client] = max(left, -self._longest * self._rate), now
        if len(self._left) > _CLIENTS:
            self._left.popitem(last=False)
        return left
