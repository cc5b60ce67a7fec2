"""The stream of one client's connection: heads and chunks are bounded, and small pieces charged."""

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from tornado.iostream import IOStream, StreamClosedError

from server.http.errors import HTTP_ERRORS
from server.tasks import strip_error, strip_future_error

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
_CHUNKS, _CHUNK = 256, 512  # chunks allowed per request, and one more per so many bytes
_PIECE = 512  # bytes below which a piece of a request is small
# Of each request so many small pieces, and small chunks, are free. Of the others, so many cost as
# much as a page: more than they take, but few clients send any.
_FREE_PIECES, _PIECES_OF_A_PAGE = 8, 2
_END = 4  # bytes of the longest end of a head
_HANG_UP_SECONDS = 2.0
_LAST_CHUNK = b"0\r\n\r\n"
_LINES, _BYTES = 20.0, 16384.0  # of a head, whose parsing costs as much as a page


class ClientStream(IOStream):
    """A connection whose client may end its side of it and still wait for the answer.

    Small pieces and chunks take as long to handle as large ones, and are charged to the client.
    What it sends while it owes for them is read as one piece. A connection whose request has
    hundreds of small chunks is closed.

    address: of the client that is charged: the peer, or whom a trusted proxy named in the current
    request's head. last: the client has announced its last request (Connection: close), and that is
    complete. The end of the input is expected then, and once all of that request has come;
    otherwise it means that the client has gone. head: cost in pages of parsing the last request's.
    refused: the last head is no request's.
    """

    last = refused = False
    head = 0.0
    _ended = False
    _received = _chunks = 0
    _awaited: int | None = None  # bytes of the last request
    _tail: bytes | None = None  # what came last, of a last request in chunks
    _unjudged = False  # whether a head has come of which is not known yet if it is the last's
    _searched = 0  # bytes of the head
    _small = 0  # pieces of the current request
    _paused: asyncio.TimerHandle | None = None  # until it reads again

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        charge: Callable[[str, float], float],
        **options: Any,
    ) -> None:
        """charge: takes a cost in pages from an address, and returns the seconds that it owes."""
        super().__init__(connection, **options)
        self.peer = self.address = peer
        self._charge = charge

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
        if self._paused:
            asyncio.get_running_loop().remove_reader(self.fileno())  # until `_go_on`
            return None
        count = super().read_from_fd(buf)
        self._received += count or 0
        if self._awaited is not None:
            self._awaited -= count or 0
        if count and count < _PIECE:
            self._small += 1
            if self._small > _FREE_PIECES and (owed := self._charge_small()):
                self._paused = asyncio.get_running_loop().call_later(owed, self._go_on)
        if count and self._tail is not None:
            last = bytes(buf[max(0, count - len(_LAST_CHUNK)) : count])
            self._tail = (self._tail + last)[-len(_LAST_CHUNK) :]
        whole = self._awaited == 0 or self._tail == _LAST_CHUNK
        if count != 0 or not (self.last or self._unjudged or whole):
            return count
        if self._ended:
            return None
        # A byte that is never parsed: with one in the buffer, Tornado does not wait for more.
        self._ended = True
        buf[:1] = b"\n"
        return 1

    def _charge_small(self) -> float:
        """Charge a small piece or chunk; returns the seconds that the client owes."""
        return self._charge(self.address, 1 / _PIECES_OF_A_PAGE)

    def _go_on(self) -> None:
        """Read again what comes."""
        self._paused = None
        if not self.closed() and self._state is not None:
            waits, reads = self._state, self.io_loop.READ
            self.io_loop.update_handler(self.fileno(), waits & ~reads)  # as the loop has it
            self.io_loop.update_handler(self.fileno(), waits)

    def judge(self, last: bool, body: int | None) -> None:
        """Take what a head says: whether it is the last request's, and the bytes of its body, None
        if it comes in chunks. If the input has ended before the request has, the client has gone.
        """
        self._unjudged = False
        come = self._read_buffer_size - self._ended
        if last and body is not None:
            self._awaited = max(0, body - come)
        elif last:
            self._tail = bytes(self._read_buffer[max(0, come - len(_LAST_CHUNK)) : come])
        if self._ended and self._awaited != 0 and self._tail != _LAST_CHUNK:
            self.close()

    async def read_until_regex(self, regex: bytes, max_bytes: int | None = None) -> bytes:
        """Read up to a pattern: Tornado's server reads a request's head with this.

        Raises StreamClosedError also if the client has gone: of requests that it sent ahead,
        thousands may be in the buffer, and Tornado would answer them all.
        """
        if self.closed():
            raise StreamClosedError
        if self._paused and self.address != self.peer:
            self._paused.cancel()  # of a proxy's connection the next client may be another
            self._go_on()
        self.address = self.peer
        self._searched = self._small = self._chunks = 0
        self._received = self._read_buffer_size  # what was sent ahead
        try:
            head = await super().read_until_regex(regex, max_bytes)
        except StreamClosedError:
            self.refused = self._searched > 0  # a part of a head came, or too much of one
            raise
        self._unjudged = True
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
        small = self._chunks - self._received / _CHUNK
        if small > _CHUNKS:
            return asyncio.ensure_future(self._hang_up())
        if small > _FREE_PIECES and (owed := self._charge_small()):
            return asyncio.ensure_future(self._read_until_later(owed, delimiter, max_bytes))
        return super().read_until(delimiter, max_bytes)

    async def _read_until_later(
        self, seconds: float, delimiter: bytes, max_bytes: int | None
    ) -> bytes:
        await asyncio.sleep(seconds)
        return await super().read_until(delimiter, max_bytes)


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
