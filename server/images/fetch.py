"""Fetches images by URL, if domains are allowed: only by https, never from private addresses.

Each name is looked up once and the connection goes to the very address that was checked, so DNS
rebinding has no effect. Every redirect is checked like the first URL.
"""

import asyncio
import ipaddress
import math
import socket
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
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

from runtime.errors import InvalidRequest, VignetteError
from server.bodies import shown
from server.fairness.errors import QueueFull
from server.fairness.fair_queue import FairQueue
from server.tasks import note_error

_REDIRECTS = 3
_LOOKUPS, _FETCHES = 8, 32  # at a time
_CONNECT_SECONDS, _LONGEST_SECONDS = 5.0, 15.0
_SLOW_SECONDS = 2.0  # after which a fetch gives way to a client that has fewer
_GAVE_WAY = "image_url answers slowly, and others wait, too: try again later"
# Fraction of the connection's seconds: Tornado logs errors that come after its own time-out.
_LOOKING_UP = 0.9
_HEAD_BYTES = 16 * 1024
_PIECES, _PIECE = 256, 512  # pieces allowed per body, and one more per so many bytes
# Missing from Python's own list, or until lately: local NAT64, deprecated site-local addresses,
# IPv4-compatible IPv6, IPv4 translated to IPv6 (RFC 2765).
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96", "3fff::/20", "5f00::/16",
         "192.0.0.0/24", "168.63.129.16/32"),  # the last two: used inside clouds
    )
)  # fmt: skip
_HOST, _LABEL = 253, 63  # characters (RFC 1035, 2.3.4); Python is slow to look up longer names
_MOVED = (301, 302, 303, 307, 308)


@dataclass(eq=False, slots=True)
class _Fetch:
    """A fetch under way. seconds: left to look up the host. stream: the connection, once open.
    body: received of the present answer, in so many pieces.
    """

    client: str
    seconds: float = _CONNECT_SECONDS
    stream: IOStream | None = None
    gave_way: bool = False
    body: bytearray = field(default_factory=bytearray)
    pieces: int = 0

    def opened(self, stream: IOStream) -> None:
        """Take the connection, and count the chunks of the body that it reads."""
        self.stream, read_until = stream, stream.read_until

        def next_chunk(*args: Any, **options: Any) -> Awaitable[bytes]:
            self.take(b"")
            if self.drips:
                raise StreamClosedError
            return read_until(*args, **options)

        stream.read_until = next_chunk  # type: ignore[method-assign]
        if self.gave_way:
            stream.close()

    def take(self, piece: bytes) -> None:
        """Add to the body; hang up on a server that sends single bytes, as each takes as long."""
        self.body += piece
        self.pieces += 1
        if self.drips and self.stream is not None:
            self.stream.close()

    @property
    def drips(self) -> bool:
        """Whether the body comes in too many pieces."""
        return self.pieces > _PIECES + len(self.body) / _PIECE

    def give_way(self) -> None:
        """Close the connection, now or once it is open."""
        self.gave_way = True
        if self.stream is not None:
            self.stream.close()


_current: ContextVar[_Fetch] = ContextVar("the fetch of this task")


class ForbiddenUrl(InvalidRequest):
    """A URL that must not be fetched."""


class FetchFailed(VignetteError):
    """The other server did not return the image."""


class Lookups(Resolver):
    """Looks names up on its own threads, so that a hanging name server delays only look-ups.
    Clients have equal shares of the threads.
    """

    def initialize(self) -> None:
        """Create the thread pool; threads start when needed."""
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")
        self._turns = FairQueue(_LOOKUPS, spare=True)

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        """Addresses of `host`. Raises OSError, also on time-out."""
        fetch = _current.get()
        try:
            async with asyncio.timeout(fetch.seconds):
                await self._turns.take(fetch.client)
                looking = asyncio.get_running_loop().run_in_executor(
                    self._threads,
                    partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM),
                )
                looking.add_done_callback(partial(self._ended, fetch.client))
                found = await asyncio.shield(looking)  # a thread can't be stopped
        except TimeoutError:
            raise OSError("its name was not looked up in time") from None
        return [(kind, address) for kind, _, _, _, address in found]

    def _ended(self, client: str, looking: "asyncio.Future[Any]") -> None:
        self._turns.give(client)
        note_error(looking)


class PublicResolver(Resolver):
    """Looks names up, and refuses those with addresses that are not public."""

    def initialize(self, inner: Resolver | None = None) -> None:
        """inner: the resolver that asks the name server; tests replace it."""
        self._inner = inner or Lookups()

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        """Addresses of `host`. Raises ForbiddenUrl if any of them is not public."""
        found = await self._inner.resolve(host, port, family)
        for _, address in found:
            if not is_public(address[0]):
                raise ForbiddenUrl(f"{host} is not a public address: image_url may not lead there")
        return found


def is_public(address: str) -> bool:
    """Whether an IP address is public; IPv6 that embeds IPv4 is judged by the IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if any(ip in network for network in _NOT_PUBLIC):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return inner.is_global
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF).is_global
    return ip.is_global and not ip.is_multicast


class _Connections(TCPClient):
    """Opens connections, and lets the fetch of each know it."""

    async def connect(self, *args: Any, **options: Any) -> IOStream:
        """The connection; closed already if its fetch was to give way meanwhile."""
        stream = await super().connect(*args, **options)
        _current.get().opened(stream)
        return stream


class Fetcher:
    """Fetches images from allowed domains.

    Clients have equal shares of the places, and a fetch that is slow gives way to a client that
    has fewer.
    """

    def __init__(
        self, domains: tuple[str, ...], limit: int, resolver: Resolver | None = None, **client: Any
    ) -> None:
        """domains: `name`, or `.name` to include subdomains. limit: most bytes of an image."""
        self._domains, self._limit = tuple(d.lower() for d in domains), limit
        resolver = resolver or PublicResolver()
        self._http = SimpleAsyncHTTPClient(
            force_instance=True,
            resolver=resolver,
            max_body_size=limit,
            max_header_size=_HEAD_BYTES,
            max_buffer_size=limit + 64 * 1024,
            max_clients=_FETCHES,
        )
        self._http.tcp_client = _Connections(resolver)
        self._turns = FairQueue(_FETCHES, spare=True)
        self._slow: dict[_Fetch, None] = {}  # the oldest first
        self._client = client

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
        for slow in self._slow:
            if self._turns.would_give_way(slow.client, client):
                self._give_way(slow)
                break
        await self._turns.take(client)
        try:
            begin()
        except BaseException:
            self._turns.give(client, 0)
            raise
        fetch, end = _Fetch(client), time.monotonic() + min(seconds, _LONGEST_SECONDS)
        fetching = asyncio.create_task(self._follow(url, end, fetch))
        late = asyncio.get_running_loop().call_later(_SLOW_SECONDS, self._is_slow, fetch)
        fetching.add_done_callback(partial(self._ended, fetch, time.monotonic(), late))
        # If cancelled, Tornado would log the outcome all the same; a fetch ends by its deadline.
        return await asyncio.shield(fetching)

    def _is_slow(self, fetch: _Fetch) -> None:
        self._slow[fetch] = None
        if self._turns.would_give_way(fetch.client):
            self._give_way(fetch)

    def _give_way(self, fetch: _Fetch) -> None:
        del self._slow[fetch]
        fetch.give_way()

    def _ended(
        self,
        fetch: _Fetch,
        began: float,
        late: asyncio.TimerHandle,
        fetching: "asyncio.Task[bytes]",
    ) -> None:
        late.cancel()
        self._slow.pop(fetch, None)
        self._turns.give(fetch.client, time.monotonic() - began)
        note_error(fetching)

    async def _follow(self, url: str, end: float, fetch: _Fetch) -> bytes:
        _current.set(fetch)
        for _ in range(_REDIRECTS + 1):
            self.check(url)
            try:
                answer = await self._ask(url, end - time.monotonic(), fetch)
            except FetchFailed as cause:
                if fetch.gave_way:
                    raise QueueFull(_GAVE_WAY, math.ceil(_SLOW_SECONDS)) from cause
                if fetch.drips:
                    raise FetchFailed("image_url comes in single bytes") from cause
                raise
            if answer.code not in _MOVED:
                return bytes(fetch.body)
            try:
                url = urljoin(url, answer.headers.get("Location", ""))
            except ValueError as cause:
                raise FetchFailed("image_url leads on to what is no URL") from cause
        raise FetchFailed("image_url leads on too often")

    async def _ask(self, url: str, seconds: float, fetch: _Fetch) -> HTTPResponse:
        connect = min(_CONNECT_SECONDS, seconds)
        fetch.seconds, fetch.stream = connect * _LOOKING_UP, None
        fetch.body, fetch.pieces = bytearray(), 0
        options = {k: v for k, v in self._client.items() if k != "port"}
        request = HTTPRequest(
            url, follow_redirects=False, connect_timeout=connect,
            request_timeout=max(0.1, seconds), decompress_response=False,
            streaming_callback=fetch.take, **options,
        )  # fmt: skip
        try:
            answer = await self._http.fetch(request, raise_error=False)
        except ForbiddenUrl:
            raise
        except HTTPTimeoutError as cause:
            raise FetchFailed("image_url did not answer in time") from cause
        except (OSError, HTTPClientError, UnsatisfiableReadError, ValueError) as cause:
            raise FetchFailed(f"image_url can't be fetched: {shown(cause)}") from cause
        if answer.code == 599 or isinstance(answer.error, HTTPTimeoutError):
            if isinstance(answer.error, ForbiddenUrl):
                raise answer.error
            raise FetchFailed(f"image_url can't be fetched: {shown(answer.error)}")
        if answer.code != 200 and answer.code not in _MOVED:
            raise FetchFailed(f"image_url answered {answer.code}")
        return answer
