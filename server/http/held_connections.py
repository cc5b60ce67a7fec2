"""New connections of clients that owe for pages, small pieces, errors or leaving: they are read one
by one.
"""

import asyncio
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from server.addresses import Network, group_of, within
from server.fairness.token_buckets import TokenBuckets

_MOST, _MOST_OF_EACH = 256, 64  # connections that wait
_TURN_SECONDS = 0.01  # between two of one client
_ALL_TURNS_SECONDS = 1 / 300  # between two of any clients
_GONE = getattr(select, "POLLRDHUP", 0)  # 0: can't be told here
_Waiting = deque[tuple[socket.socket, Any]]  # oldest first


class HeldConnections:
    """Connections that wait for their turns. Parsing a request takes as long as a page, so one that
    its client has left meanwhile is not read. Used on the event loop's thread only.
    """

    def __init__(
        self,
        pages: TokenBuckets,
        proxies: list[Network],
        begin: Callable[[socket.socket, Any], object],
        share: float = 1.0,
    ) -> None:
        """pages: what clients owe. proxies: whose connections are of many clients, and never wait.
        begin: called with a connection and its address when its turn has come. share: of the
        machine's turns, of this process.
        """
        self._turn, self._all_turns = _TURN_SECONDS / share, _ALL_TURNS_SECONDS / share
        self._pages, self._proxies, self._begin = pages, proxies, begin
        self._held: dict[str, _Waiting] = {}  # by client

    def hold(self, connection: socket.socket, address: Any, room: int) -> bool:
        """Let a connection wait if its client owes; false if it does not. room: for connections
        that wait, at most.
        """
        peer = str(address[0])
        group = group_of(peer)
        if within(peer, self._proxies) or not (group in self._held or self._pages.owed(group)):
            return False
        if group not in self._held:
            self._held[group] = deque()
            self._let_in_later(group)
        self._held[group].append((connection, address))
        if len(self._held[group]) > _MOST_OF_EACH:
            _close_one(self._held[group])
        elif len(self) > min(_MOST, room):
            _close_one(max(self._held.values(), key=len))
        return True

    def charge(self, address: str, cost: float) -> float:
        """Charge a client, unless it is a proxy; returns the seconds that it owes."""
        if within(address, self._proxies):
            return 0.0
        return self._pages.spend(group_of(address), cost)

    def _let_in_later(self, group: str) -> None:
        wait = max(self._turn, len(self._held) * self._all_turns)
        asyncio.get_running_loop().call_later(wait, self._let_in, group)

    def _let_in(self, group: str) -> None:
        """Begin with a client's oldest connection that it has not left."""
        waiting = self._held.get(group, deque())
        while waiting:
            connection, address = waiting.popleft()
            if not _has_gone(connection):
                self._begin(connection, address)
                break
            connection.close()
        if waiting:
            self._let_in_later(group)
        else:
            self._held.pop(group, None)

    def __len__(self) -> int:
        """Number of connections that wait."""
        return sum(map(len, self._held.values()))

    def close(self) -> None:
        """Close all connections that wait."""
        while self._held:
            for connection, _ in self._held.popitem()[1]:
                connection.close()


def _close_one(waiting: _Waiting) -> None:
    """Close a client's oldest connection if it has left that, else its newest."""
    closed = waiting.popleft() if _has_gone(waiting[0][0]) else waiting.pop()
    closed[0].close()


def _has_gone(connection: socket.socket) -> bool:
    """Whether the client has left, or ended its side of the connection, which is rare."""
    poll = select.poll()
    poll.register(connection, _GONE)
    return bool(poll.poll(0))
