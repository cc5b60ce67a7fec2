"""Fetches images by URL, if domains are allowed: only by https, never from private addresses.

Each name is looked up once and the connection goes to the very address that was checked, so DNS
rebinding has no effect. Every redirect is checked like the first URL.

Connections have an event loop on a thread of its own, and handshakes threads beside it: see
`server.images.tls`.
"""

import asyncio
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.iostream import IOStream, StreamClosedError, UnsatisfiableReadError
from tornado.netutil import Resolver
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient
from tornado.tcpclient import TCPClient

from runtime.errors import VignetteError
from server.fairness.fair_queue import FairQueue
from server.fairness.token_buckets import TokenBuckets
from server.images.hosts import ForbiddenUrl, PublicResolver, looking_up
from server.images.tls import Handshake, NoAnswer, TlsStream, handshake_threads
from server.loop_thread import LoopThread
from server.refusals import QueueFull
from server.requests.parts import shown
from server.tasks import retrieve_error

_REDIRECTS = 3
_FETCHES = 32  # at a time
# Bytes fetched, a second and at once, of all clients: by TLS they take a core as long as twice as
# many of uploads do.
_BYTES, _MUCH = (50e6, 16e6), 64 * 1024
_CONNECT_SECONDS, _LONGEST_SECONDS = 5.0, 15.0
_LATE_SECONDS = 1.0  # after its end, when a fetch is ended from outside
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2: without numbers of the site's own length
_SLOW_SECONDS = 2.0  # after which a fetch gives way to a client that has fewer
_GAVE_WAY = "image_url answers slowly, and others wait, too: try again later"
_LATE = "image_url did not answer in time"
# Fraction of the connection's seconds: Tornado logs errors that come after its own time-out.
_LOOKING_UP = 0.9
_HEAD_BYTES = 16 * 1024
_PIECES, _PIECE = 256, 512  # reads and chunks allowed per answer, and one more per so many bytes
_PIECE_COST = 2048  # bytes that take as long as a read or a chunk does, beside its own
_SECOND_COST = 200e6  # bytes that a second of TLS counts as
_TURN_SECONDS = 0.002  # that a fetch may go on for while others have something to read
_HOST, _LABEL = 253, 63  # characters (RFC 1035, 2.3.4); Python is slow to look up longer names
_MOVED = (301, 302, 303, 307, 308)


@dataclass(eq=False, slots=True)
class _Fetch:
    """A fetch under way, on the connections' thread. connection: from when it is open; stream: from
    when hands have been shaken on it.

    Of the present answer, body: received so far; received: bytes, heads included; reads: of the
    connection, at most a TLS record each; chunks: of the body. cost: of all answers, bytes and what
    reads and chunks take, as bytes. refused: why this side ended the connection. What has come by
    then may look like a whole answer, if that has no length.
    """

    client: str
    connection: socket.socket | None = None
    handshake: Handshake | None = None
    stream: IOStream | None = None
    gave_way: bool = False
    late: bool = False
    body: bytearray = field(default_factory=bytearray)
    received: int = 0
    reads: int = 0
    chunks: int = 0
    cost: int = 0
    turn_ends: float = 0.0
    refused: str | None = None

    def opened(self, stream: IOStream) -> None:
        """Take the connection, count what it reads, and let others have their turns.

        Tornado reads on for as long as there is something to read, and runs nothing else meanwhile.
        """
        self.stream, read_from_fd = stream, stream.read_from_fd
        read_until, read_bytes = stream.read_until, stream.read_bytes

        def read(buffer: bytearray | memoryview) -> int | None:
            began = time.thread_time()
            try:
                count = read_from_fd(buffer)
            except NoAnswer:
                self.refused = "sends what is no answer"
                return 0
            except ssl.SSLError:
                self.refused = "sends broken TLS"
                return 0  # the end: of other errors Tornado's client tells nobody
            finally:
                self.spend(time.thread_time() - began)
            if count:
                self.received += count
                self.reads += 1
                self.cost += count + _PIECE_COST
            return 0 if self._drips() else count

        def next_chunk(*args: Any, **options: Any) -> Awaitable[bytes]:
            self.chunks += 1
            self.cost += _PIECE_COST
            if self._drips():
                raise StreamClosedError
            return self._in_turn(read_until(*args, **options))

        def next_piece(*args: Any, **options: Any) -> Awaitable[bytes]:
            return self._in_turn(read_bytes(*args, **options))

        stream.read_from_fd = read  # type: ignore[method-assign, assignment]
        stream.read_until = next_chunk  # type: ignore[method-assign]
        stream.read_bytes = next_piece  # type: ignore[method-assign]
        if self.gave_way or self.late:
            stream.close()

    def spend(self, seconds: float) -> None:
        """Charge computation."""
        self.cost += round(seconds * _SECOND_COST)

    def _in_turn(self, reading: Awaitable[bytes]) -> Awaitable[bytes]:
        """The read, after others have run if this fetch's turn is over."""
        return reading if time.monotonic() < self.turn_ends else self._after_others(reading)

    async def _after_others(self, reading: Awaitable[bytes]) -> bytes:
        await asyncio.sleep(0)
        self.turn_ends = time.monotonic() + _TURN_SECONDS
        return await reading

    async def closed(self) -> None:
        """Let go of the connection, which refers to this, after what it still computes."""
        if self.stream is not None:
            del self.stream.read_from_fd, self.stream.read_until, self.stream.read_bytes
        if self.handshake is not None and self.handshake.computing is not None:
            await asyncio.wait([self.handshake.computing])
            retrieve_error(self.handshake.computing)
        self.connection = self.handshake = self.stream = None

    def take(self, piece: bytes) -> None:
        """Add to the body."""
        self.body += piece

    def _drips(self) -> bool:
        """Refuse an answer that comes in too many pieces, as each takes as long as a large one."""
        most_reads, most_chunks = self.received // _PIECE, len(self.body) // _PIECE
        if self.reads > _PIECES + most_reads or self.chunks > _PIECES + most_chunks:
            self.refused = "comes in single bytes"
        return self.refused is not None

    def raise_why_ended(self) -> None:
        """Raise QueueFull or FetchFailed if this side ended the connection."""
        if self.gave_way:
            raise QueueFull(_GAVE_WAY, math.ceil(_SLOW_SECONDS))
        if self.refused is not None:
            raise FetchFailed(f"image_url {self.refused}")
        if self.late:
            raise FetchFailed(_LATE)

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


_current: ContextVar[_Fetch] = ContextVar("the fetch of this task")


class FetchFailed(VignetteError):
    """The other server did not return the image."""


class _Connections(TCPClient):
    """Opens connections, and lets the fetch of each know it."""

    def __init__(self, resolver: Resolver, threads: ThreadPoolExecutor) -> None:
        """threads: for handshakes."""
        super().__init__(resolver)
        self._threads = threads

    async def connect(self, host: str, *args: Any, **options: Any) -> IOStream:
        """The connection; closed already if its fetch was to give way meanwhile. Raises OSError,
        TimeoutError among them.
        """
        tls, buffer = options.pop("ssl_options"), options.get("max_buffer_size")
        end = asyncio.get_running_loop().time() + options["timeout"]
        plain = await super().connect(host, *args, **options)
        connection, fetch = plain.socket, _current.get()
        plain.io_loop.remove_handler(connection)
        plain.socket = None  # type: ignore[assignment]  # as Tornado's own change to TLS does
        fetch.connection, fetch.handshake = connection, Handshake(tls, host)
        try:
            async with asyncio.timeout_at(end):
                await fetch.handshake.shake(connection, self._threads, fetch.spend)
        except BaseException:
            connection.close()
            raise
        stream = TlsStream(connection, fetch.handshake, max_buffer_size=buffer)
        fetch.opened(stream)
        return stream


class Fetcher:
    """Fetches images from allowed domains.

    Clients have equal shares of the places and of the bytes fetched, and a fetch that is slow gives
    way to a client that has fewer.
    """

    def __init__(
        self, domains: tuple[str, ...], limit: int, resolver: Resolver | None = None, **client: Any
    ) -> None:
        """domains: `name`, or `.name` to include subdomains. limit: most bytes of an image."""
        self._domains, self._limit = tuple(d.lower() for d in domains), limit
        self._resolver = resolver or PublicResolver()
        self._turns = FairQueue(_FETCHES, spare=True)
        self._bytes = TokenBuckets(*_BYTES, total=_BYTES[0], least=_MUCH)
        self._slow: dict[_Fetch, None] = {}  # the oldest first
        self._client = {"ssl_options": _tls(), **client}
        self._thread: LoopThread | None = None  # started by the first fetch
        self._handshakes = handshake_threads(_FETCHES)
        self._http: SimpleAsyncHTTPClient | None = None

    def check(self, url: str) -> None:
        """Raise ForbiddenUrl for a URL not by https, not on an allowed domain, or obfuscated."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError as cause:
            raise ForbiddenUrl("image_url is not a URL") from cause
        if parts.scheme != "https":
            raise ForbiddenUrl("image_url must begin with https://")
        if parts.username is not None or parts.password is not None or "\\" in url:
            raise ForbiddenUrl("image_url must not hold a user name or backslashes")
        labels = host.split(".")
        if not host.isascii() or len(host) > _HOST or max(map(len, labels)) > _LABEL:
            raise ForbiddenUrl("image_url must name its host in ASCII (xn--...), and not at length")
        if parts.netloc.endswith(":") or (port not in (None, 443) and "port" not in self._client):
            raise ForbiddenUrl("image_url must use the usual port")
        allowed = any(
            host == d.lstrip(".") or (d.startswith(".") and host.endswith(d)) for d in self._domains
        )
        if not allowed:
            raise ForbiddenUrl(f"image_url: {shown(host)} is not among the allowed domains")

    async def fetch(
        self, url: str, seconds: float, client: str, begin: Callable[[], object] = lambda: None
    ) -> bytes:
        """Fetch the image at `url` within `seconds`. Raises ForbiddenUrl, FetchFailed or QueueFull.

        client: fetches take turns by client. begin: called when the turn has come; what it raises
        is raised.
        """
        self.check(url)
        await asyncio.sleep(self._bytes.owed(client))
        for slow in self._slow:
            if self._turns.call_back(slow.client, client):
                self._give_way(slow)
                break
        await self._turns.take(client)
        try:
            begin()
        except BaseException:
            self._turns.give(client, 0)
            raise
        fetch, seconds = _Fetch(client), min(seconds, _LONGEST_SECONDS)
        began, loop = time.monotonic(), asyncio.get_running_loop()
        self._thread = self._thread or LoopThread("fetch")
        work = self._thread.start(self._follow(url, began + seconds, fetch))
        fetching = asyncio.wrap_future(work)
        timers = (
            loop.call_later(_SLOW_SECONDS, self._is_slow, fetch),
            loop.call_later(seconds + _LATE_SECONDS, fetch.expire),
        )
        fetching.add_done_callback(partial(self._ended, fetch, began, timers))
        # If cancelled, Tornado would log the outcome all the same; a fetch ends by its deadline.
        return await asyncio.shield(fetching)

    def _is_slow(self, fetch: _Fetch) -> None:
        self._slow[fetch] = None
        if self._turns.call_back(fetch.client):
            self._give_way(fetch)

    def _give_way(self, fetch: _Fetch) -> None:
        del self._slow[fetch]
        fetch.give_way()

    def _ended(
        self,
        fetch: _Fetch,
        began: float,
        timers: Iterable[asyncio.TimerHandle],
        fetching: "asyncio.Future[bytes]",
    ) -> None:
        for timer in timers:
            timer.cancel()
        self._slow.pop(fetch, None)
        self._bytes.spend(fetch.client, fetch.cost)
        self._turns.give(fetch.client, time.monotonic() - began, fetch.gave_way)
        retrieve_error(fetching)

    def close(self) -> None:
        """End the connections' thread; no fetch may be under way."""
        if self._thread is not None:
            self._thread.close()
        self._handshakes.shutdown(wait=False)

    def _new_client(self) -> SimpleAsyncHTTPClient:
        """A client for the event loop that runs."""
        made = SimpleAsyncHTTPClient(
            force_instance=True,
            resolver=self._resolver,
            max_body_size=self._limit,
            max_header_size=_HEAD_BYTES,
            max_buffer_size=self._limit + 64 * 1024,
            max_clients=_FETCHES,
        )
        made.tcp_client = _Connections(self._resolver, self._handshakes)
        return made

    async def _follow(self, url: str, end: float, fetch: _Fetch) -> bytes:
        """Fetch, on the connections' thread."""
        _current.set(fetch)
        self._http = self._http or self._new_client()
        for _ in range(_REDIRECTS + 1):
            self.check(url)
            try:
                answer = await self._ask(url, end - time.monotonic(), fetch)
            finally:
                fetch.raise_why_ended()
            if answer.code not in _MOVED:
                return bytes(fetch.body)
            try:
                url = urljoin(url, answer.headers.get("Location", ""))
            except ValueError as cause:
                raise FetchFailed("image_url leads on to what is no URL") from cause
        raise FetchFailed("image_url leads on too often")

    async def _ask(self, url: str, seconds: float, fetch: _Fetch) -> HTTPResponse:
        assert self._http is not None
        connect = min(_CONNECT_SECONDS, seconds)
        looking_up.set((fetch.client, connect * _LOOKING_UP))
        fetch.body, fetch.received, fetch.reads, fetch.chunks = bytearray(), 0, 0, 0
        options = {k: v for k, v in self._client.items() if k != "port"}
        request = HTTPRequest(
            url, follow_redirects=False, connect_timeout=connect,
            request_timeout=max(0.1, seconds), decompress_response=False,
            streaming_callback=fetch.take, **options,
        )  # fmt: skip
        try:
            answer = await self._http.fetch(request, raise_error=False)
        except HTTPTimeoutError as cause:
            raise FetchFailed(_LATE) from cause
        except (OSError, HTTPClientError, UnsatisfiableReadError, ValueError) as cause:
            raise FetchFailed(f"image_url can't be fetched: {shown(cause)}") from cause
        finally:
            await fetch.closed()
        if answer.code != 200 and answer.code not in _MOVED:
            raise FetchFailed(f"image_url answered {answer.code}")
        return answer


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context
