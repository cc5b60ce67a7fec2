"""Fetches images by URL, if domains are allowed: only by https, never from private addresses.

Each name is looked up once and the connection goes to an address that was checked, so DNS rebinding
has no effect. Every redirect is checked like the first URL.
"""

import asyncio
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from urllib.parse import urljoin, urlsplit

import pycurl

from server.fairness.equal_shares import EqualShares
from server.fairness.token_buckets import TokenBuckets
from server.images.download import LATE, Answer, Download
from server.images.hosts import FetchFailed, ForbiddenUrl, PublicHosts
from server.refusals import QueueFull
from server.requests.parts import shown
from server.tasks import retrieve_error

_REDIRECTS = 3
_FETCHES = 32  # at a time
# Bytes fetched, a second and at once, of all clients.
_BYTES, _MUCH = (50e6, 16e6), 64 * 1024
# Seconds of a core, likewise, that downloads may compute; most seconds in which that is repaid.
_COMPUTING, _LONG, _REPAID = (0.25, 0.25), 0.005, 60.0
# Seconds of a core after which a download is ended; the second if its client owes for more than
# `_DEBT_SECONDS`. Ten megabytes take 0.01 to 0.05.
_MOST_COMPUTED, _MOST_OF_DEBTOR = 0.5, 0.1
_DEBT_SECONDS = 1.0
_CONNECT_SECONDS, _LONGEST_SECONDS = 5.0, 15.0
_SLOW_SECONDS = 2.0  # after which a fetch gives way to a client that has fewer
_WATCH_SECONDS = 0.1
_LATE_SECONDS = 1.0  # after its end, when a fetch is ended from outside
_HOST = 253  # characters (RFC 1035, 2.3.4); Python is slow to look up longer names
_NAME = re.compile(r"[a-z0-9_][a-z0-9_-]{0,62}(\.[a-z0-9_][a-z0-9_-]{0,62})*")


class Fetcher:
    """Fetches images from allowed domains.

    Clients have equal shares of the places and of the bytes fetched, and a fetch that is slow gives
    way to a client that has fewer. Used on the event loop's thread only.
    """

    def __init__(
        self, domains: tuple[str, ...], limit: int, hosts: PublicHosts | None = None,
        port: int = 443,
    ) -> None:  # fmt: skip
        """domains: `name`, or `.name` to include subdomains. limit: most bytes of an image."""
        self._domains, self._limit = tuple(d.lower() for d in domains), limit
        self._hosts, self._port = hosts or PublicHosts(), port
        self._turns = EqualShares(_FETCHES)
        self._bytes = TokenBuckets(*_BYTES, total=_BYTES[0], least=_MUCH)
        self._seconds = TokenBuckets(*_COMPUTING, longest=_REPAID, total=_COMPUTING[0], least=_LONG)
        self._slow: dict[_Fetch, None] = {}  # the oldest first
        self._unused: list[pycurl.Curl] = []  # each keeps the certificates that it has read

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
        if len(host) > _HOST or not _NAME.fullmatch(host):  # libcurl looks others up by itself
            raise ForbiddenUrl("image_url must name its host in ASCII (xn--...), and not at length")
        if parts.netloc.endswith(":") or (port not in (None, 443)):
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
        while True:
            if (owed := self._owed(client)) > seconds:
                message = "much was fetched for you: try again later"
                raise QueueFull(message, ceil(owed))
            await asyncio.sleep(owed)
            for slow in self._slow:
                if self._turns.call_back(slow.client, client):
                    self._give_way(slow)
                    break
            await self._turns.take(client)
            if not self._owed(client):
                break
            self._turns.give(client, 0)  # it owes for what was fetched meanwhile
        try:
            begin()
        except BaseException:
            self._turns.give(client, 0)
            raise
        fetch = _Fetch(client, min(seconds, _LONGEST_SECONDS), self._limit)
        following = asyncio.ensure_future(self._follow(url, fetch))
        timer = asyncio.get_running_loop().call_later(_SLOW_SECONDS, self._is_slow, fetch)
        following.add_done_callback(partial(self._ended, fetch, timer))
        try:
            return await asyncio.shield(following)
        except asyncio.CancelledError:
            fetch.download.end(FetchFailed(LATE))  # its place is taken until its thread has ended
            raise

    def _owed(self, client: str) -> float:
        """Seconds in which a client begins no download."""
        return max(self._bytes.owed(client), self._seconds.owed(client))

    def _is_slow(self, fetch: "_Fetch") -> None:
        self._slow[fetch] = None
        if self._turns.call_back(fetch.client):
            self._give_way(fetch)

    def _give_way(self, fetch: "_Fetch") -> None:
        del self._slow[fetch]
        fetch.gave_way = True
        message = "image_url answers slowly, and others wait, too: try again later"
        fetch.download.end(QueueFull(message, ceil(_SLOW_SECONDS)))

    def _ended(
        self, fetch: "_Fetch", timer: asyncio.TimerHandle, following: "asyncio.Future[bytes]"
    ) -> None:
        timer.cancel()
        self._slow.pop(fetch, None)
        self._bytes.spend(fetch.client, fetch.download.size)
        self._turns.give(fetch.client, time.monotonic() - fetch.began, fetch.gave_way)
        retrieve_error(following)

    async def _follow(self, url: str, fetch: "_Fetch") -> bytes:
        for _ in range(_REDIRECTS + 1):
            self.check(url)
            answer = await self._ask(url, fetch)
            if answer.location is None:
                return bytes(answer.body)
            try:
                url = urljoin(url, answer.location)
            except ValueError as cause:
                raise FetchFailed("image_url leads on to what is no URL") from cause
        raise FetchFailed("image_url leads on too often")

    async def _ask(self, url: str, fetch: "_Fetch") -> Answer:
        host, connect = urlsplit(url).hostname, min(_CONNECT_SECONDS, fetch.left)
        try:
            addresses = await self._hosts.look_up(str(host), fetch.client, connect)
        except (OSError, ValueError) as cause:  # ValueError: a name that there can't be
            raise FetchFailed(f"image_url can't be fetched: {shown(cause)}") from cause
        curl = self._unused.pop() if self._unused else pycurl.Curl()
        # The thread is not used again: it may end at the lowest priority.
        executor = ThreadPoolExecutor(1, "fetch")
        asking = asyncio.get_running_loop().run_in_executor(
            executor, fetch.download.ask, curl, url, self._port, addresses, connect, fetch.left
        )
        executor.shutdown(wait=False)
        while not asking.done():
            await asyncio.wait([asking], timeout=_WATCH_SECONDS)
            self._watch(fetch)
        self._unused.append(curl)
        return asking.result()

    def _watch(self, fetch: "_Fetch") -> None:
        """Charge what a download has computed since, and end one that computes for long, or is
        late.
        """
        download = fetch.download
        computed = download.computed
        if computed > fetch.charged:
            self._seconds.spend(fetch.client, computed - fetch.charged)
            fetch.charged = computed
        owed = self._seconds.owed(fetch.client)
        if computed > _MOST_COMPUTED:
            download.end(FetchFailed("image_url takes too long to read"))
            download.compute_last()
        elif computed > _MOST_OF_DEBTOR and owed > _DEBT_SECONDS:
            message = "these images take too long to read: try again later"
            download.end(QueueFull(message, ceil(owed)))
            download.compute_last()
        if fetch.left < -_LATE_SECONDS:
            download.end(FetchFailed(LATE))


class _Fetch:
    """A fetch under way. charged: seconds of computation that its client has paid for."""

    def __init__(self, client: str, seconds: float, limit: int) -> None:
        self.client, self.download = client, Download(limit)
        self.began = time.monotonic()
        self._end = self.began + seconds
        self.charged = 0.0
        self.gave_way = False

    @property
    def left(self) -> float:
        """Seconds that it has left."""
        return self._end - time.monotonic()
