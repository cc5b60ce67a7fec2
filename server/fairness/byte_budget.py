"""The bytes of bodies and answers that are inside a front-end, whatever model they are for."""

from collections import Counter

from server.fairness.errors import QueueFull

_RETRY_SECONDS = 1


class ByteBudget:
    """Counts them, by client. Used on the event loop's thread only."""

    def __init__(self, most: int) -> None:
        """Let at most `most` in together; of what others leave, half may be one client's."""
        self.held = 0
        self._most = most
        self._by_client: Counter[str] = Counter()

    def hold(self, size: int, client: str) -> None:
        """Count bytes of a body in. Raises QueueFull if there are too many already."""
        before = self._by_client[client]
        left = self._most - (self.held - before)
        if self.held + size > self._most or before + size > left // 2:
            message = "too many bytes are being sent at once: try again later"
            raise QueueFull(message, _RETRY_SECONDS)
        self.owe(size, client)

    def owe(self, size: int, client: str) -> None:
        """Count bytes of an answer in, which can't be refused any more."""
        assert size >= 0, "less than nothing would make room for others' bytes"
        self.held += size
        self._by_client[client] += size

    def let_go(self, size: int, client: str) -> None:
        """Count them out again."""
        self.held -= size
        self._by_client[client] -= size
        if not self._by_client[client]:
            del self._by_client[client]
