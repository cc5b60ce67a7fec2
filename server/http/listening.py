"""The HTTP server of a front-end: accepts connections, and bounds how many are open.

All front-ends accept from the same sockets, which the supervisor listens on. A connection that does
not wait for an answer is idle and may be closed for a new one: the oldest of the address that has
the most idle connections.
"""

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from tornado.http1connection import HTTP1Connection, HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)

from server.addresses import Network, address_of, group_of
from server.http.client_stream import ClientStream
from server.http.connections import Connections
from server.http.held_connections import HeldConnections
from server.telemetry.logs import RateLimitedLog

log = logging.getLogger(__name__)

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_SCHEME_AND_HOST = re.compile("https?://[^/?#]*", re.IGNORECASE)
_PAUSE_SECONDS = 0.5  # pause in accepting when the system has no room for another connection


class Server(HTTPServer):
    """Tornado's server with a limit on connections. Used on the event loop's thread only."""

    def initialize(  # type: ignore[override]
        self,
        app: Any,
        most: int,
        connections: Connections,
        proxies: list[Network],
        share: float,
        **options: Any,
    ) -> None:
        """most: open connections allowed. connections: of the application. proxies,
        share: see `HeldConnections`. options: of Tornado's server.
        """
        self._of_app, self._proxies = connections, proxies
        self._held = HeldConnections(connections.pages, proxies, self._begin, share)
        super().initialize(app, **options)
        self._most = most
        self._open: set[object] = set()
        self._idle: dict[str, dict[HTTP1ServerConnection, None]] = {}  # by address, oldest first
        self._seldom = RateLimitedLog(log)

    # --- Accepting --------------------------------------------------------------------------------

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept from these sockets, one connection at a time, so that others get some."""
        loop = asyncio.get_running_loop()
        for sock in sockets:
            sock.setblocking(False)
            self._sockets[sock.fileno()] = sock
            self._handlers[sock.fileno()] = partial(self._stop_accepting, sock)
            loop.add_reader(sock, self._accept, sock)

    def stop(self) -> None:
        """Stop accepting, and close the connections that wait to be read."""
        super().stop()
        self._held.close()

    def _stop_accepting(self, sock: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(sock)

    def _accept(self, sock: socket.socket) -> None:
        try:
            connection, address = sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # another front-end took the connection, or the client has gone
        except OSError as cause:
            if cause.errno not in _FULL:
                raise
            self._seldom.warning("no room for another connection (%s)", cause.strerror)
            self._make_room()
            self._stop_accepting(sock)
            asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._resume, sock)
            return
        if not self._held.hold(connection, address, self._most - len(self._open)):
            self._begin(connection, address)

    def _begin(self, connection: socket.socket, address: Any) -> None:
        if len(self._open) + len(self._held) >= self._most and not self._make_room():
            connection.close()
            return
        self.handle_stream(
            ClientStream(
                connection,
                str(address[0]),
                self._held.charge,
                max_buffer_size=self.max_buffer_size,
                read_chunk_size=self.read_chunk_size,
            ),
            address,
        )

    def _resume(self, sock: socket.socket) -> None:
        if sock.fileno() in self._sockets:  # -1 once the server has stopped
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def _make_room(self) -> bool:
        """Close a late, unread or idle connection, in this order; returns whether there was one."""
        self._seldom.warning(
            "%d connections are open, the most that may be: idle ones are closed for new ones",
            len(self._open),
        )
        for waiting in (self._of_app.late, self._of_app.unread):
            while waiting:
                stream = next(iter(waiting))
                del waiting[stream]
                if not stream.closed():
                    stream.close()
                    return True
        if not self._idle:
            return False
        address = max(self._idle, key=lambda each: len(self._idle[each]))
        victim = next(iter(self._idle[address]))
        self._forget(victim)
        victim.stream.close()
        return True

    # --- What connections do ----------------------------------------------------------------------

    def start_request(
        self, server_conn: object, request_conn: HTTPConnection
    ) -> HTTPMessageDelegate:
        """Count the connection as idle until its next request is complete."""
        assert isinstance(server_conn, HTTP1ServerConnection)
        stream = server_conn.stream
        assert isinstance(stream, ClientStream)
        self._open.add(server_conn)
        self._idle.setdefault(_address(server_conn), {})[server_conn] = None
        delegate = super().start_request(server_conn, request_conn)
        assert isinstance(request_conn, HTTP1Connection)
        whole = partial(self._busy, server_conn)
        return _Watched(delegate, request_conn, stream, self._proxies, whole)

    def on_close(self, server_conn: object) -> None:
        """Forget a closed connection."""
        super().on_close(server_conn)
        assert isinstance(server_conn, HTTP1ServerConnection)
        self._forget(server_conn)
        stream = server_conn.stream
        assert isinstance(stream, ClientStream)
        if stream.refused:
            self._held.charge(stream.peer, 1 + stream.head)

    def _busy(self, connection: HTTP1ServerConnection) -> None:
        """The connection has sent its request and waits for the answer: it is not idle."""
        address = _address(connection)
        idle = self._idle.get(address, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(address, None)

    def _forget(self, connection: HTTP1ServerConnection) -> None:
        self._busy(connection)
        self._open.discard(connection)


def _origin_form(target: str) -> str:
    """A request's target without scheme and host, which clients of proxies name (RFC 9112, 3.2)."""
    if (found := _SCHEME_AND_HOST.match(target)) is None:
        return target
    path = target[found.end() :]
    return path if path.startswith("/") else f"/{path}"


def _address(connection: HTTP1ServerConnection) -> str:
    assert isinstance(connection.stream, ClientStream)
    return group_of(connection.stream.peer)


def _is_last(start_line: RequestStartLine, headers: HTTPHeaders) -> bool:
    """Whether the client announces that it sends no further request (RFC 9112, 9.3).

    In HTTP/1.0 Tornado keeps a connection open for this very value alone.
    """
    said = headers.get("Connection", "").lower()
    if start_line.version == "HTTP/1.0":
        return said != "keep-alive"
    return "close" in {option.strip() for option in said.split(",")}


class _Watched(HTTPMessageDelegate):
    """Tells the stream what a request's head says, and calls `whole` when the request is complete.

    proxies: trusted to name the client in X-Forwarded-For.
    """

    def __init__(
        self,
        delegate: HTTPMessageDelegate,
        connection: HTTP1Connection,
        stream: ClientStream,
        proxies: list[Network],
        whole: Callable[[], None],
    ) -> None:
        self._delegate, self._connection = delegate, connection
        self._stream, self._proxies, self._whole = stream, proxies, whole
        self._last = False

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Any:
        assert isinstance(start_line, RequestStartLine)
        start_line = start_line._replace(path=_origin_form(start_line.path))
        forwarded = headers.get("X-Forwarded-For", "")
        self._stream.address = address_of(self._stream.peer, forwarded, self._proxies)
        taken = self._delegate.headers_received(start_line, headers)  # raises for a wrong Host
        self._stream.refused = False
        self._last = _is_last(start_line, headers)
        if self._last:  # Tornado sees it in fewer forms
            self._connection._disconnect_on_finish = True
        body = headers.get("Content-Length", "0")
        known = body.isdecimal() and "Transfer-Encoding" not in headers
        self._stream.judge(self._last, int(body[:20]) if known else None)
        return taken

    def data_received(self, chunk: bytes) -> Any:
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        self._whole()
        self._stream.last = self._last
        self._delegate.finish()

    def on_connection_close(self) -> None:
        self._delegate.on_connection_close()
