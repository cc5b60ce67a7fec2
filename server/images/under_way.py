"""A fetch under way: what it may read and compute, and how it ends from outside.

Tornado reads an answer on for as long as there is something to read, and runs nothing else
meanwhile: a site that sends fast would have the thread to itself.
"""

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tornado.iostream import IOStream, StreamClosedError

from runtime.errors import VignetteError
from server.images.tls import Handshake, NoAnswer
from server.refusals import QueueFull
from server.tasks import retrieve_error

SLOW_SECONDS = 2.0  # after which a fetch gives way to a client that has fewer
LATE = "image_url did not answer in time"
_GAVE_WAY = "image_url answers slowly, and others wait, too: try again later"
_PIECES, _PIECE = 256, 512  # reads and chunks allowed per answer, and one more per so many bytes
_LINES = 200  # most of a head
_HEAD_ENDS = b"\n\n", b"\n\r\n"  # as Tornado has it
_TURN_SECONDS = 0.002  # that a fetch may go on for while others have something to read
_PAUSE_SECONDS = 0.25  # between turns, at most, for a client that owes computation


class FetchFailed(VignetteError):
    """The other server did not return the image."""


@dataclass(eq=False, slots=True)
class FetchUnderWay:
    """A fetch, on the connections' thread. connection: from when it is open; stream: from when
    hands have been shaken on it.

    charge: takes seconds of computation from the client; returns those in which it has none.

    Of the present answer, body: received so far; received: bytes, heads included; reads: of the
    connection, at most a TLS record each; searched: bytes of the head without its end; chunks: of
    the body. cost: bytes of all answers. refused: why this side ended the connection.
    What has come by then may look like a whole answer, if that has no length.
    """

    client: str
    charge: Callable[[str, float], float]
    connection: socket.socket | None = None
    handshake: Handshake | None = None
    stream: IOStream | None = None
    gave_way: bool = False
    late: bool = False
    body: bytearray = field(default_factory=bytearray)
    received: int = 0
    reads: int = 0
    searched: int = 0
    chunks: int = 0
    cost: int = 0
    refused: str | None = None
    _computed: float = 0.0  # seconds that are not charged yet
    _resumed: float = math.inf  # the thread's time as the fetch was last given something
    _turn_ends: float = 0.0

    def begin(self) -> None:
        """Begin with an answer."""
        self.body, self.received, self.reads, self.searched, self.chunks = bytearray(), 0, 0, 0, 0

    def opened(self, stream: IOStream) -> None:
        """Take the connection, count what it reads and computes, and let others have their turns.

        Between two waits of Tornado's client for the stream the thread does this fetch's work.
        """
        self.stream, read_from_fd, end = stream, stream.read_from_fd, stream.close
        read_until, read_until_regex = stream.read_until, stream.read_until_regex
        find = stream._find_read_pos
        self._resumed = math.inf  # a redirect's connection begins with nothing done

        def read(buffer: bytearray | memoryview) -> int | None:
            try:
                with self._computing():
                    count = read_from_fd(buffer)
            except NoAnswer:
                self.refused = "sends what is no answer"
                return 0
            except ssl.SSLError:
                self.refused = "sends broken TLS"
                return 0  # the end: of other errors Tornado's client tells nobody
            if count:
                self.received += count
                self.cost += count
                self.reads += 1
            return 0 if self._drips() else count

        async def head(*args: Any, **options: Any) -> bytes:
            self.searched = 0
            lines = await read_until_regex(*args, **options)
            if lines.count(b"\n") > _LINES:  # which Tornado takes apart in one piece
                self.refused = "sends a head of hundreds of lines"
                raise StreamClosedError
            return lines

        def close(*args: Any, **options: Any) -> None:
            self._pause()  # an answer without a body ends here
            end(*args, **options)

        def search() -> int | None:
            with self._computing():
                return find() if stream._read_regex is None or self._may_end(stream) else None

        def next_chunk(*args: Any, **options: Any) -> Awaitable[bytes]:
            self.chunks += 1
            if self._drips():
                raise StreamClosedError
            return read_until(*args, **options)

        stream.read_from_fd = read  # type: ignore[method-assign, assignment]
        stream.read_until = self._in_turns(next_chunk)  # type: ignore[method-assign]
        stream.read_until_regex = self._in_turns(head)  # type: ignore[method-assign]
        stream.read_bytes = self._in_turns(stream.read_bytes)  # type: ignore[method-assign]
        stream.close = close  # type: ignore[method-assign]
        stream._find_read_pos = search  # type: ignore[method-assign]
        if self.gave_way or self.late:
            stream.close()

    def _in_turns(self, method: Callable[..., Awaitable[bytes]]) -> Callable[..., Awaitable[bytes]]:
        """The method, whose result comes after others have run if this fetch's turn is over."""

        async def wait(*args: Any, **options: Any) -> bytes:
            self._pause()
            try:
                if time.monotonic() >= self._turn_ends:
                    await asyncio.sleep(min(_PAUSE_SECONDS, self.pay()))
                    self._turn_ends = time.monotonic() + _TURN_SECONDS
                return await method(*args, **options)
            finally:
                self._resumed = time.thread_time()

        return wait

    def _pause(self) -> None:
        """Note what was computed since the fetch was given something."""
        self.computed(max(0.0, time.thread_time() - self._resumed))
        self._resumed = math.inf

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Note what the block computes, which is not between two waits."""
        began = time.thread_time()
        try:
            yield
        finally:
            self.computed(time.thread_time() - began)

    def computed(self, seconds: float) -> None:
        """Note computation, to be charged."""
        self._computed += seconds

    def pay(self) -> float:
        """Charge the computation; returns the seconds until the client may have more."""
        seconds, self._computed = self._computed, 0.0
        return self.charge(self.client, seconds)

    async def closed(self) -> None:
        """Let go of the connection, which refers to this, after what it still computes."""
        if (stream := self.stream) is not None:
            del stream.read_from_fd, stream.read_until, stream.read_until_regex, stream.read_bytes
            del stream.close, stream._find_read_pos
        if self.handshake is not None and self.handshake.computing is not None:
            await asyncio.wait([self.handshake.computing])
            retrieve_error(self.handshake.computing)
        self.connection = self.handshake = self.stream = None
        self.pay()

    def take(self, piece: bytes) -> None:
        """Add to the body. Tornado's client may let others run after it."""
        self.body += piece
        self._pause()

    def _may_end(self, stream: IOStream) -> bool:
        """Whether a head has its end in what came last, or is too long: only then Tornado is to
        look, which begins anew with each piece.
        """
        head = stream._read_buffer
        new, self.searched = head[max(0, self.searched - 2) :], len(head)
        too_long = len(head) > (stream._read_max_bytes or 0)
        return too_long or any(end in new for end in _HEAD_ENDS)

    def _drips(self) -> bool:
        """Refuse an answer that comes in too many pieces, as each takes as long as a large one."""
        most_reads, most_chunks = self.received // _PIECE, len(self.body) // _PIECE
        if self.reads > _PIECES + most_reads or self.chunks > _PIECES + most_chunks:
            self.refused = "comes in single bytes"
        return self.refused is not None

    def raise_why_ended(self) -> None:
        """Raise QueueFull or FetchFailed if this side ended the connection."""
        if self.gave_way:
            raise QueueFull(_GAVE_WAY, math.ceil(SLOW_SECONDS))
        if self.refused is not None:
            raise FetchFailed(f"image_url {self.refused}")
        if self.late:
            raise FetchFailed(LATE)

    def give_way(self) -> None:
        """End the fetch for another client's, on any thread."""
        self.gave_way = True
        self._end()

    def expire(self) -> None:
        """End the fetch as its time is over, on any thread."""
        self.late = True
        self._end()

    def _end(self) -> None:
        """End the connection, now or once it is open, even if the thread is busy with it."""
        if (opened := self.connection) is not None:
            with suppress(OSError):  # it has ended
                opened.shutdown(socket.SHUT_RDWR)
