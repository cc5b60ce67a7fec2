"""A fair queue of one place that is kept for clients that send one request after the other."""

import asyncio
from collections.abc import Callable
from time import monotonic

from server.fairness.fair_queue import FairQueue
from server.fairness.returning_clients import ReturningClients


class PatientQueue(FairQueue):
    """Keeps the place for a client that has just left and is expected back, from those that had so
    much more; else it would wait for each of their requests. It is charged for that time.
    """

    def __init__(self, patience: float, clock: Callable[[], float] = monotonic) -> None:
        """patience: seconds for which the place is kept. `give` is to be told seconds."""
        super().__init__(1, clock=clock)
        self._returning = ReturningClients(patience, clock)
        self._patience, self._clock = patience, clock
        # For whom the place is kept, since when, and the look at it later.
        self._kept: tuple[str, float, asyncio.TimerHandle] | None = None

    def _came(self, client: str) -> None:
        super()._came(client)
        self._returning.came(client)

    def _left(self, client: str) -> None:
        self._returning.left(client)

    def _gave_up(self, client: str) -> None:
        self._returning.gone(client)

    def _begin(self, client: str) -> None:
        self._end_keeping()
        super()._begin(client)

    def _grant(self) -> None:
        self._end_keeping()
        super()._grant()

    def _keep_from(self, client: str) -> bool:
        much = self._clocks.of(client) - self._patience
        others = (each for each in self._returning.expected() if self._clocks.of(each[0]) < much)
        awaited = min(others, key=lambda each: self._clocks.of(each[0]), default=None)
        if awaited is None:
            return False
        self._end_keeping()
        expected, seconds = awaited
        later = asyncio.get_running_loop().call_later(seconds, self._grant)
        self._kept = expected, self._clock(), later
        return True

    def _end_keeping(self) -> None:
        """Charge the client for which the place was kept, as if it had held it."""
        if self._kept is not None:
            client, since, later = self._kept
            later.cancel()
            self._kept = None
            self._charge(client, self._clock() - since)
