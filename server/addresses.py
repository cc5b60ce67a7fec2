"""Where a request comes from, also behind proxies."""

import ipaddress
from functools import cache

from runtime.errors import VignetteError

_FORWARDED = 2000  # characters of X-Forwarded-For that are looked at, the last ones
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class InvalidProxies(VignetteError):
    """A setting that names no network."""


@cache
def networks(names: tuple[str, ...]) -> list[Network]:
    """Addresses and networks by their names. Raises InvalidProxies."""
    try:
        return [ipaddress.ip_network(name) for name in names]
    except ValueError as cause:
        raise InvalidProxies(f"--trusted-proxies: {cause}") from cause


def address_of(peer: str, forwarded: str, proxies: list[Network]) -> str:
    """Whom a request is from: its peer, or whom a trusted proxy says that it had it from.

    forwarded: its X-Forwarded-For.
    """
    peer = _plain(peer)
    said = forwarded[-_FORWARDED:].split(",")
    while proxies and said and _within(peer, proxies):
        before = _plain(said.pop().strip())
        if not _is_address(before):
            break
        peer = before
    return peer


def _plain(address: str) -> str:
    """Without the port that some proxies add, and IPv4 as itself."""
    if address.startswith("["):
        address = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        address = address.partition(":")[0]
    if not _is_address(address):
        return address
    ip = ipaddress.ip_address(address)
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def group_of(address: str) -> str:
    """Whom an address stands for: in IPv6 everybody has at least 64 bits of them."""
    if ":" not in address or not _is_address(address):
        return address
    return str(ipaddress.ip_network(f"{address}/64", strict=False))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # behind it anything may stand


def _within(address: str, proxies: list[Network]) -> bool:
    if not _is_address(address):
        return False
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in proxies)
