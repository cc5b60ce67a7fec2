"""Fetches images by URL, if domains are allowed: only by https, never from private addresses.

Each name is looked up once and the connection goes to the very address that was checked, so DNS
rebinding has no effect. Every redirect is checked like the first URL.
"""

import asyncio
import ipaddress
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest, HTTPResponse
from tornado.iostream import UnsatisfiableReadError
from tornado.netutil import Resolver
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient

from runtime.errors import InvalidRequest, VignetteError
from server.bodies import shown
from server.fairness.fair_queue import FairQueue
from server.tasks import note_error

_REDIRECTS = 3
_LOOKUPS, _FETCHES = 8, 32  # at a time
_CONNECT_SECONDS, _LONGEST_SECONDS = 5.0, 15.0
# Fraction of the connection's seconds: Tornado logs errors that come after its own time-out.
_LOOKING_UP = 0.9
_HEAD_BYTES = 16 * 1024
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
# The client whose URL a task fetches, and the seconds left to look up the host.
_looking_up: ContextVar[tuple[str, float]] = ContextVar(
    "looking up", default=("", _CONNECT_SECONDS)
)


class ForbiddenUrl(InvalidRequest):
    """A URL that must not be fetched."""


class FetchFailed(VignetteError):
    """The other server did not return the image."""


class Lookups(Resolver):
    """Looks names up on its own threads, so that a hanging name server delays only look-ups. One
    client has half of the threads at most.
    """

    def initialize(self) -> None:
        """Create the thread pool; threads start when needed."""
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")
        self._turns = FairQueue(_LOOKUPS, _LOOKUPS // 2)

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        """Addresses of `host`. Raises OSError, also on time-out."""
        client, seconds = _looking_up.get()
        try:
            async with asyncio.timeout(seconds):
                await self._turns.take(client)
                looking = asyncio.get_running_loop().run_in_executor(
                    self._threads,
                    partial(socket.getaddrinfo, host, port, family, socket.SOCK_STREAM),
                )
                looking.add_done_callback(partial(self._ended, client))
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


class Fetcher:
    """Fetches images from allowed domains."""

    def __init__(
        self, domains: tuple[str, ...], limit: int, resolver: Resolver | None = None, **client: Any
    ) -> None:
        """domains: `name`, or `.name` to include subdomains. limit: most bytes of an image."""
        self._domains, self._limit = tuple(d.lower() for d in domains), limit
        self._http = SimpleAsyncHTTPClient(
            force_instance=True,
            resolver=resolver or PublicResolver(),
            max_body_size=limit,
            max_header_size=_HEAD_BYTES,
            max_buffer_size=limit + 64 * 1024,
            max_clients=_FETCHES,
        )
        self._turns = FairQueue(_FETCHES, _FETCHES // 2)
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
        if port not in (None, 443) and "port" not in self._client:
            raise ForbiddenUrl("image_url must use the usual port")
        allowed = any(
            host == d.lstrip(".") or (d.startswith(".") and host.endswith(d)) for d in self._domains
        )
        if not allowed:
            raise ForbiddenUrl(f"image_url: {shown(host)} is not among the allowed domains")

    async def fetch(self, url: str, seconds: float, client: str) -> bytes:
        """Fetch the image at `url` within `seconds`. Raises ForbiddenUrl or FetchFailed.

        client: fetches take turns by client.
        """
        self.check(url)
        await self._turns.take(client)
        end = time.monotonic() + min(seconds, _LONGEST_SECONDS)
        fetching = asyncio.create_task(self._follow(url, end, client))
        fetching.add_done_callback(partial(self._ended, client))
        # If cancelled, Tornado would log the outcome all the same; a fetch ends by its deadline.
        return await asyncio.shield(fetching)

    def _ended(self, client: str, fetching: "asyncio.Task[bytes]") -> None:
        self._turns.give(client)
        note_error(fetching)

    async def _follow(self, url: str, end: float, client: str) -> bytes:
        for _ in range(_REDIRECTS + 1):
            self.check(url)
            answer = await self._ask(url, end - time.monotonic(), client)
            if answer.code not in _MOVED:
                return answer.body
            try:
                url = urljoin(url, answer.headers.get("Location", ""))
            except ValueError as cause:
                raise FetchFailed("image_url leads on to what is no URL") from cause
        raise FetchFailed("image_url leads on too often")

    async def _ask(self, url: str, seconds: float, client: str) -> HTTPResponse:
        connect = min(_CONNECT_SECONDS, seconds)
        _looking_up.set((client, connect * _LOOKING_UP))
        options = {k: v for k, v in self._client.items() if k != "port"}
        request = HTTPRequest(
            url, follow_redirects=False, connect_timeout=connect,
            request_timeout=max(0.1, seconds), decompress_response=False, **options,
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
