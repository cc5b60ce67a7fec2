"""How fast one client is refused, so that answering errors leaves time for captions.

A refusal costs the front-end as much as a request that is served. A client that is served gets as
many refusals as it likes, almost; one that sends nothing but what is refused waits for the answers.
"""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

_RATE, _BURST = 50.0, 100.0  # refusals a second, and at once
_LONGEST_SECONDS = 5.0
_CLIENTS = 1024  # that are remembered


class Refusals:
    """Credit of each client: it grows with time and with each answer that is none."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._credit: OrderedDict[str, tuple[float, float]] = OrderedDict()  # and when it was

    def served(self, client: str) -> None:
        """It got what it asked for."""
        self._change(client, 1.0)

    def wait(self, client: str) -> float:
        """Seconds that its next refusal has to wait; it is counted."""
        credit = self._change(client, -1.0)
        return min(_LONGEST_SECONDS, max(0.0, -credit / _RATE))

    def _change(self, client: str, change: float) -> float:
        now = self._clock()
        credit, at = self._credit.pop(client, (_BURST, now))
        credit = min(_BURST, credit + (now - at) * _RATE) + change
        self._credit[client] = max(credit, -_LONGEST_SECONDS * _RATE), now
        if len(self._credit) > _CLIENTS:
            self._credit.popitem(last=False)
        return credit
