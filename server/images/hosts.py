"""Looks up hosts of URLs that strangers name: public addresses only."""

import asyncio
import ipaddress
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from runtime.errors import InvalidRequest, VignetteError
from server.fairness.equal_shares import EqualShares
from server.tasks import retrieve_error

_LOOKUPS = 8  # at a time
_JUDGED, _ADDRESSES = 64, 4  # of a host's addresses, and of each kind that are tried
_KNOWN, _KNOWN_SECONDS = 256, 10.0  # hosts whose addresses are remembered, and for how long
# Missing from Python's own list, or until lately: local NAT64, deprecated site-local addresses,
# IPv4-compatible IPv6, IPv4 translated to IPv6 (RFC 2765).
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        ("64:ff9b:1::/48", "fec0::/10", "::/96", "::ffff:0:0:0/96", "3fff::/20", "5f00::/16",
         "192.0.0.0/24", "168.63.129.16/32"),  # the last two: used inside clouds
    )
)  # fmt: skip


class FetchFailed(VignetteError):
    """The other server did not return the image."""


class ForbiddenUrl(InvalidRequest):
    """A URL that must not be fetched."""


class PublicHosts:
    """Looks up hosts, and refuses those that are not public.

    On threads of its own, so that a hanging name server delays only look-ups, of which clients have
    equal shares. What was found lately is known without one.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUPS, "lookup")  # started when needed
        self._turns = EqualShares(_LOOKUPS)
        self._known: dict[str, tuple[list[str], float]] = {}  # by host, oldest first; until when

    async def look_up(self, host: str, client: str, seconds: float) -> list[str]:
        """The first addresses of `host`, of each kind. Raises OSError, also if there are none
        within `seconds`, and ForbiddenUrl if one of its first addresses is not public.
        """
        found, until = self._known.get(host, ([], 0.0))
        if time.monotonic() > until:
            found = await self._look_up(host, client, seconds)
            if not all(map(is_public, found)):
                raise ForbiddenUrl(f"{host} is not a public address: image_url may not lead there")
            found = _first(_ADDRESSES, found)
            self._know(host, found)
        return found

    async def _look_up(self, host: str, client: str, seconds: float) -> list[str]:
        try:
            async with asyncio.timeout(seconds):
                await self._turns.take(client)
                looking = asyncio.get_running_loop().run_in_executor(
                    self._threads, self._addresses, host
                )
                looking.add_done_callback(partial(self._ended, client))
                return await asyncio.shield(looking)  # a thread can't be stopped
        except TimeoutError:
            raise OSError("its name was not looked up in time") from None

    def _know(self, host: str, found: list[str]) -> None:
        self._known.pop(host, None)
        self._known[host] = found, time.monotonic() + _KNOWN_SECONDS
        if len(self._known) > _KNOWN:
            del self._known[next(iter(self._known))]

    def _addresses(self, host: str) -> list[str]:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return _first(_JUDGED, [str(address[0]) for *_, address in found])

    def _ended(self, client: str, looking: "asyncio.Future[list[str]]") -> None:
        self._turns.give(client)
        retrieve_error(looking)


def _first(count: int, addresses: list[str]) -> list[str]:
    """The first so many addresses of IPv6, and of IPv4."""
    six = [each for each in addresses if ":" in each]
    four = [each for each in addresses if ":" not in each]
    return six[:count] + four[:count]


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
