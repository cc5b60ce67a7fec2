"""Bounds the bytes of bodies and responses inside a front-end, over all models."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from time import monotonic

from server.refusals import QueueFull

_RETRY_SECONDS = 1
_UNREAD = 0.25  # of all bytes, above which no large page is added to unread responses
_STEP, _STEP_SECONDS = 64 * 1024, 1.0  # fewest bytes that a body must gain in so many seconds


@dataclass(slots=True, eq=False)
class Incoming:
    """A body being received. close: drops the body, and releases its bytes at once.

    size, since: bytes received in the current step, and when the step began.
    """

    client: str
    close: Callable[[], object]
    since: float
    size: int = 0


class ByteBudget:
    """Counts bytes by client. Used on the event loop's thread only."""

    def __init__(self, most: int, clock: Callable[[], float] = monotonic) -> None:
        """Hold at most `most` bytes in all; one client may have half of what the others leave."""
        self.held = self.unread = 0  # bytes in all, and those of responses
        self._most, self._clock = most, clock
        self._by_client: Counter[str] = Counter()
        self._incoming: dict[Incoming, None] = {}  # longest in the current step first

    def begin(self, client: str, close: Callable[[], object]) -> Incoming:
        """Register a body; `end` it when it is received, or given up."""
        body = Incoming(client, close, self._clock())
        self._incoming[body] = None
        return body

    def end(self, body: Incoming) -> None:
        """Unregister a body."""
        self._incoming.pop(body, None)

    def hold(self, size: int, client: str, body: Incoming | None = None) -> None:
        """Add bytes of a body being received, or of a copy.

        If there is no room, bodies that have all but stalled are closed, of clients that hold more
        bytes than this one, the largest first. Raises QueueFull if that does not help.
        """
        if body is not None:
            body.size += size
            if body.size >= _STEP:
                body.size, body.since = 0, self._clock()
                self._incoming[body] = self._incoming.pop(body)
        late = self._clock() - _STEP_SECONDS
        while not self._fits(size, client):
            stopped = takewhile(lambda each: each.since < late, self._incoming)
            victim = max(stopped, key=self._bytes, default=None)
            if victim is None or self._bytes(victim) <= self._by_client[client] + size:
                message = "too many bytes are being sent at once: try again later"
                raise QueueFull(message, _RETRY_SECONDS)
            self.end(victim)
            victim.close()
        self._add(size, client)

    def _bytes(self, body: Incoming) -> int:
        return self._by_client[body.client]

    def _fits(self, size: int, client: str) -> bool:
        before = self._by_client[client]
        left = self._most - (self.held - before)
        return self.held + size <= self._most and before + size <= left // 2

    def hold_answer(self, size: int, client: str) -> None:
        """Add bytes of a response, which can't be refused any more."""
        self.unread += size
        self._add(size, client)

    def release_answer(self, size: int, client: str) -> None:
        """Release bytes added by `hold_answer`."""
        self.unread -= size
        self.release(size, client)

    def check_unread(self) -> None:
        """Raise QueueFull if responses that clients have not read take more than their part."""
        if self.unread > self._most * _UNREAD:
            raise QueueFull("too many answers lie unread: read yours, or try later", _RETRY_SECONDS)

    def _add(self, size: int, client: str) -> None:
        assert size >= 0, "less than nothing would make room for others' bytes"
        self.held += size
        self._by_client[client] += size

    def release(self, size: int, client: str) -> None:
        """Release bytes added by `hold`."""
        self.held -= size
        self._by_client[client] -= size
        if not self._by_client[client]:
            del self._by_client[client]
