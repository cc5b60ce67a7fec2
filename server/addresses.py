"""Client addresses of requests, also behind proxies."""

import ipaddress
from functools import cache

from server.settings import InvalidSettings

_FORWARDED = 2000  # characters read at the end of X-Forwarded-For
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@cache
def networks(names: tuple[str, ...]) -> list[Network]:
    """Parse addresses and networks. Raises InvalidSettings."""
    try:
        return [ipaddress.ip_network(name) for name in names]
    except ValueError as cause:
        raise InvalidSettings(f"--trusted-proxies: {cause}") from cause


def address_of(peer: str, forwarded: str, proxies: list[Network]) -> str:
    """Client address of a request: its peer, or the address that trusted proxies report.

    forwarded: the X-Forwarded-For header.
    """
    peer = _plain(peer)
    said = forwarded[-_FORWARDED:].split(",")
    while proxies and said and within(peer, proxies):
        before = _plain(said.pop().strip())
        if not _is_address(before):
            break
        peer = before
    return peer


def _plain(address: str) -> str:
    """The address without the port that some proxies add; IPv4-mapped IPv6 as IPv4."""
    if address.startswith("["):
        address = address[1:].partition("]")[0]
    elif address.count(":") == 1:
        address = address.partition(":")[0]
    if not _is_address(address):
        return address
    ip = ipaddress.ip_address(address)
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def group_of(address: str) -> str:
    """The address or, for IPv6, its /64 network: one client has at least a /64."""
    if ":" not in address or not _is_address(address):
        return address
    return str(ipaddress.ip_network(f"{address}/64", strict=False))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text  # a zone id may hold any text


def within(address: str, proxies: list[Network]) -> bool:
    """Whether an address is one of these proxies'."""
    if not _is_address(address):
        return False
    ip = ipaddress.ip_address(address)
    return any(ip in network for network in proxies)
