"""Looks up hosts of URLs that strangers name: public addresses only."""

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

from tornado.netutil import Resolver

from runtime.errors import InvalidRequest
from server.fairness.equal_shares import EqualShares
from server.tasks import retrieve_error

_LOOKUPS = 8  # at a time
_ADDRESSES = 4  # of a kind that are tried
# Missing from Python's own list, or until lately: local NAT64, deprecated site-local addresses,
# IPv4-compatible IPv6, IPv4 translated to IPv6 (RFC 2765).
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96", "3fff::/20", "5f00::/16",
         "192.0.0.0/24", "168.63.129.16/32"),  # the last two: used inside clouds
    )
)  # fmt: skip
# The client for which a task looks up a host, and the seconds left for it.
looking_up: ContextVar[tuple[str, float]] = ContextVar("looking up")


class ForbiddenUrl(InvalidRequest):
    """A URL that must not be fetched."""


class Lookups(Resolver):
    """Looks names up on its own threads, so that a hanging name server delays only look-ups.
    Clients have equal shares of the threads.
    """

    def initialize(self) -> None:
        """Create the thread pool; threads start when needed."""
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")
        self._turns = EqualShares(_LOOKUPS)

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        """Addresses of `host`. Raises OSError, also on time-out."""
        client, seconds = looking_up.get()
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
        retrieve_error(looking)


class PublicResolver(Resolver):
    """Looks names up, and refuses those with addresses that are not public."""

    def initialize(self, inner: Resolver | None = None) -> None:
        """inner: the resolver that asks the name server; tests replace it."""
        self._inner = inner or Lookups()

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        """The first addresses of `host`. Raises ForbiddenUrl if any of its addresses is not public.

        Tornado tries them all, and calls itself for each that fails at once.
        """
        found = await self._inner.resolve(host, port, family)
        first: dict[int, list[Any]] = {}
        for kind, address in found:
            if not is_public(address[0]):
                raise ForbiddenUrl(f"{host} is not a public address: image_url may not lead there")
            first.setdefault(kind, []).append(address)
        return [(kind, each) for kind, all_ in first.items() for each in all_[:_ADDRESSES]]


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
