"""Fetches images by URL, if domains are allowed: only by https, never from private addresses.

Each name is looked up once and the connection goes to the very address that was checked, so DNS
rebinding has no effect. Every redirect is checked like the first URL.

Connections have an event loop on a thread of its own, and handshakes threads beside it: see
`server.images.tls`.
"""

import asyncio
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.iostream import IOStream, UnsatisfiableReadError
from tornado.netutil import Resolver
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient
from tornado.tcpclient import TCPClient

from server.fairness.equal_shares import EqualShares
from server.fairness.token_buckets import TokenBuckets
from server.images.hosts import ForbiddenUrl, PublicResolver, looking_up
from server.images.tls import Handshake, TlsStream, handshake_threads
from server.images.under_way import LATE, SLOW_SECONDS, FetchFailed, FetchUnderWay
from server.loop_thread import LoopThread
from server.requests.parts import shown
from server.tasks import retrieve_error

_REDIRECTS = 3
_FETCHES = 32  # at a time
# Bytes fetched, a second and at once, of all clients.
_BYTES, _MUCH = (50e6, 16e6), 64 * 1024
# Seconds of a core, likewise, that TLS and reading answers may take.
_COMPUTING, _LONG = (0.25, 0.25), 0.005
_CONNECT_SECONDS, _LONGEST_SECONDS = 5.0, 15.0
_LATE_SECONDS = 1.0  # after its end, when a fetch is ended from outside
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2: without numbers of the site's own length
# Fraction of the connection's seconds: Tornado logs errors that come after its own time-out.
_LOOKING_UP = 0.9
_HEAD_BYTES = 16 * 1024
_HOST, _LABEL = 253, 63  # characters (RFC 1035, 2.3.4); Python is slow to look up longer names
_MOVED = (301, 302, 303, 307, 308)


_current: ContextVar[FetchUnderWay] = ContextVar("the fetch of this task")


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
                await fetch.handshake.shake(connection, self._threads, fetch.computed)
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
        self._turns = EqualShares(_FETCHES)
        self._bytes = TokenBuckets(*_BYTES, total=_BYTES[0], least=_MUCH)
        self._seconds = TokenBuckets(
            *_COMPUTING, longest=_LONGEST_SECONDS, total=_COMPUTING[0], least=_LONG
        )
        self._charging = threading.Lock()
        self._slow: dict[FetchUnderWay, None] = {}  # the oldest first
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
        await asyncio.sleep(max(self._bytes.owed(client), self._charge(client, 0.0)))
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
        fetch, seconds = FetchUnderWay(client, self._charge), min(seconds, _LONGEST_SECONDS)
        began, loop = time.monotonic(), asyncio.get_running_loop()
        self._thread = self._thread or LoopThread("fetch")
        work = self._thread.start(self._follow(url, began + seconds, fetch))
        fetching = asyncio.wrap_future(work)
        timers = (
            loop.call_later(SLOW_SECONDS, self._is_slow, fetch),
            loop.call_later(seconds + _LATE_SECONDS, fetch.expire),
        )
        fetching.add_done_callback(partial(self._ended, fetch, began, timers))
        # If cancelled, Tornado would log the outcome all the same; a fetch ends by its deadline.
        return await asyncio.shield(fetching)

    def _charge(self, client: str, seconds: float) -> float:
        """Take seconds of computation from a client, on any thread; returns those that it owes."""
        with self._charging:
            return self._seconds.spend(client, seconds) if seconds else self._seconds.owed(client)

    def _is_slow(self, fetch: FetchUnderWay) -> None:
        self._slow[fetch] = None
        if self._turns.call_back(fetch.client):
            self._give_way(fetch)

    def _give_way(self, fetch: FetchUnderWay) -> None:
        del self._slow[fetch]
        fetch.give_way()

    def _ended(
        self,
        fetch: FetchUnderWay,
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

    async def _follow(self, url: str, end: float, fetch: FetchUnderWay) -> bytes:
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

    async def _ask(self, url: str, seconds: float, fetch: FetchUnderWay) -> HTTPResponse:
        assert self._http is not None
        connect = min(_CONNECT_SECONDS, seconds)
        looking_up.set((fetch.client, connect * _LOOKING_UP))
        fetch.begin()
        options = {k: v for k, v in self._client.items() if k != "port"}
        request = HTTPRequest(
            url, follow_redirects=False, connect_timeout=connect,
            request_timeout=max(0.1, seconds), decompress_response=False,
            streaming_callback=fetch.take, **options,
        )  # fmt: skip
        try:
            answer = await self._http.fetch(request, raise_error=False)
        except HTTPTimeoutError as cause:
            raise FetchFailed(LATE) from cause
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
