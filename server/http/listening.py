"""The HTTP server of a front-end: accepts connections, and bounds how many are open.

All front-ends accept from the same sockets, which the supervisor listens on. A connection that does
not wait for an answer is idle and may be closed for a new one: the oldest of the address that has
the most idle connections.
"""

import asyncio
import errno
import json
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

from tornado.http1connection import HTTP1ServerConnection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, StreamClosedError

from server.addresses import Network, group_of
from server.http.connections import Connections
from server.http.held_connections import HeldConnections
from server.protocols.errors import HTTP_ERRORS
from server.tasks import strip_error, strip_future_error
from server.telemetry.logs import RateLimitedLog

log = logging.getLogger(__name__)

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# Limits on a request's head, as parsing it takes time: lines, and bytes without the query; then
# bytes of the request line before the query and of Host, which slower regular expressions parse.
_HEADERS, _HEAD, _LINE, _HOST = 200, 16 * 1024, 1024, 300
_FIELDS, _QUERY = 100, 1024  # in a query; bytes of one, but those of captions
# Bytes of a caption's: a prompt of 1,024 characters takes 12 KiB, and most models take less.
_CAPTION_QUERY = 16 * 1024
HEAD_BYTES = _HEAD + _CAPTION_QUERY
_REASON = (
    f"the head is larger than is read here: send at most {_HEADERS} lines of {_HEAD // 1024} KiB "
    f"together, a path of {_LINE} bytes, a Host of {_HOST}, {_FIELDS} fields in the query, and "
    f"{_QUERY} bytes of it, or for POST /caption {_CAPTION_QUERY // 1024} KiB"
)
_TOO_LARGE = (
    "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
    "Connection: close\r\n\r\n"
    + json.dumps({"error": {"code": HTTP_ERRORS[431].code, "message": _REASON}}) + "\n"
).encode()  # fmt: skip
_HOSTS = re.compile(rb"\nhost[ \t]*:((?:[^\n]|\n[ \t])*)", re.IGNORECASE)
_CHUNKS, _CHUNK = 256, 512  # chunks allowed per connection, and one more per so many bytes
_PIECES, _PIECE = 64, 512  # pieces allowed per head, and one more per so many bytes
_END = 4  # bytes of the longest end of a head
_HANG_UP_SECONDS = 2.0
_LINES, _BYTES = 20.0, 16384.0  # of a head, whose parsing costs as much as a page
_PAUSE_SECONDS = 0.5  # pause in accepting when the system has no room for another connection


class Server(HTTPServer):
    """Tornado's server with a limit on connections. Used on the event loop's thread only."""

    def initialize(  # type: ignore[override]
        self,
        app: Any,
        most: int,
        connections: Connections,
        proxies: list[Network],
        **options: Any,
    ) -> None:
        """most: open connections allowed. connections: of the application. proxies: see
        `HeldConnections`. options: of Tornado's server.
        """
        self._of_app = connections
        self._held = HeldConnections(connections.pages, proxies, self._begin)
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
            _Stream(
                connection,
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
        assert isinstance(stream, _Stream)
        self._open.add(server_conn)
        self._idle.setdefault(_address(server_conn), {})[server_conn] = None
        delegate = super().start_request(server_conn, request_conn)
        return _Watched(delegate, stream, lambda: self._busy(server_conn))

    def on_close(self, server_conn: object) -> None:
        """Forget a closed connection."""
        super().on_close(server_conn)
        assert isinstance(server_conn, HTTP1ServerConnection)
        self._forget(server_conn)
        stream = server_conn.stream
        assert isinstance(stream, _Stream)
        if stream.refused:
            self._held.charge(_peer(server_conn), 1 + stream.head)

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


def _address(connection: HTTP1ServerConnection) -> str:
    return group_of(_peer(connection))


def _peer(connection: HTTP1ServerConnection) -> str:
    return str(getattr(connection.context, "remote_ip", ""))


class _Stream(IOStream):
    """A connection whose client may end its side of it and still wait for the answer.

    A connection that sends a head in pieces, or a body in chunks, of a few bytes is closed: each of
    them takes as long to handle as a large one.

    last: the client has announced its last request (Connection: close), and that is complete. The
    end of the input is expected then; otherwise it means that the client has gone. head: cost in
    pages of parsing the last request's. refused: the last head is no request's.
    """

    last = refused = False
    head = 0.0
    _ended = False
    _received = _chunks = 0
    _pieces: int | None = None  # read so far of the current head
    _searched = 0  # bytes of the head

    def close(self, exc_info: Any = False) -> None:
        """Close the connection, and strip the errors that its tasks get and it keeps: they would
        hold it, and all buffers, until a full garbage collection.
        """
        reading = self._read_future
        super().close(exc_info)
        if self.error is not None:
            strip_error(self.error)
        if reading is not None:
            reading.add_done_callback(strip_future_error)

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Bytes read; None if there are none now, 0 at the end of the input."""
        count = super().read_from_fd(buf)
        self._received += count or 0
        if count and self._pieces is not None:
            self._pieces += 1
            if self._pieces > _PIECES + len(self._read_buffer) / _PIECE:
                return 0  # as if the client had gone
        if count != 0 or not self.last:
            return count
        if self._ended:
            return None
        # A byte that is never parsed: with one in the buffer, Tornado does not wait for more.
        self._ended = True
        buf[:1] = b"\n"
        return 1

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Read up to a pattern: Tornado's server reads a request's head with this."""
        self._pieces = self._searched = 0
        try:
            head = await super().read_until_regex(regex, max_bytes)
        except StreamClosedError:
            self.refused = self._pieces > 0  # a part of a head came, or too much of one
            raise
        finally:
            self._pieces = None
        self.head, self.refused = head.count(b"\n") / _LINES + len(head) / _BYTES, True
        if _takes_long(head):
            await self._hang_up(_TOO_LARGE)
        return head

    def _find_read_pos(self) -> int | None:
        """Like Tornado's, without searching the whole head again for each piece of it."""
        regex = self._read_regex
        if regex is None:
            return super()._find_read_pos()
        found = regex.search(self._read_buffer, max(0, self._searched - _END))
        self._searched = len(self._read_buffer)
        end = self._read_buffer_size if found is None else found.end()
        self._check_max_bytes(regex, end)
        return None if found is None else end

    async def _hang_up(self, answer: bytes = b"") -> bytes:
        """Close the connection after a while, as its client would reconnect at once."""
        await asyncio.sleep(_HANG_UP_SECONDS)
        if answer:
            await self.write(answer)
        self.close()
        raise StreamClosedError

    def read_until(self, delimiter: bytes, max_bytes: int | None = None) -> Awaitable[bytes]:
        """Read up to a delimiter: Tornado's server reads a chunk's length with this."""
        self._chunks += 1
        if self._chunks > _CHUNKS + self._received / _CHUNK:
            return asyncio.ensure_future(self._hang_up())
        return super().read_until(delimiter, max_bytes)


def _takes_long(head: bytes) -> bool:
    """Whether parsing the head would hold up others; no well-behaved client sends such a one."""
    line = head.lstrip(b"\r\n").partition(b"\n")[0]
    before, _, query = line.partition(b"?")
    return (
        head.count(b"\n") > _HEADERS
        or query.count(b"&") > _FIELDS
        or len(query) > (_CAPTION_QUERY if before == b"POST /caption" else _QUERY)
        or len(before) > _LINE
        or len(head) - len(query) > _HEAD
        or sum(len(host) for host in _HOSTS.findall(head)) > _HOST
    )


class _Watched(HTTPMessageDelegate):
    """Calls `whole` when a request is complete."""

    def __init__(
        self, delegate: HTTPMessageDelegate, stream: _Stream, whole: Callable[[], None]
    ) -> None:
        self._delegate, self._stream, self._whole = delegate, stream, whole
        self._last = False

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Any:
        taken = self._delegate.headers_received(start_line, headers)  # raises for a wrong Host
        self._stream.refused = False
        self._last = headers.get("Connection", "").lower() == "close"
        return taken

    def data_received(self, chunk: bytes) -> Any:
        return self._delegate.data_received(chunk)

    def finish(self) -> None:
        self._whole()
        self._stream.last = self._last
        self._delegate.finish()

    def on_connection_close(self) -> None:
        self._delegate.on_connection_close()
