"""Connections of an application that others must not wait for."""

import asyncio
from dataclasses import dataclass, field

from tornado.iostream import IOStream

from server.fairness.fair_queue import FairQueue
from server.fairness.token_buckets import TokenBuckets


@dataclass(slots=True)
class Connections:
    """What handlers tell the server of their connections. Used on the event loop's thread only.

    pages: rates of clients for requests that are no captions. late: connections held back by a rate
    limit. unread: those whose client is not reading its answer. Both are oldest first, and closed
    to make room for new ones.
    """

    pages: TokenBuckets
    late: dict[IOStream, None] = field(default_factory=dict)
    unread: dict[IOStream, None] = field(default_factory=dict)
    _turns: FairQueue = field(default_factory=lambda: FairQueue(1))

    async def turn(self, client: str) -> None:
        """Wait for a turn of the event loop that no other request has; clients take turns, so that
        one with many requests at once delays another by one of them.
        """
        await self._turns.take(client)
        asyncio.get_running_loop().call_soon(self._turns.give, client)
