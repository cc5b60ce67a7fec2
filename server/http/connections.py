"""Connections of an application that others must not wait for."""

from dataclasses import dataclass, field

from tornado.iostream import IOStream

from server.fairness.token_buckets import TokenBuckets
from server.fairness.turns import Turns


@dataclass(slots=True)
class Connections:
    """What handlers tell the server of their connections. Used on the event loop's thread only.

    turns: of requests. pages: rates of clients for requests that are no captions. late: connections
    held back by a rate limit. unread: those whose client is not reading its answer. Both are oldest
    first, and closed to make room for new ones.
    """

    pages: TokenBuckets
    late: dict[IOStream, None] = field(default_factory=dict)
    unread: dict[IOStream, None] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)
