"""Answers of web servers. What one may give later is asked for again."""

import io
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from server.bulk.inputs.items import NoWay, UnfitItem
from server.bulk.inputs.timed import Attempt, TimedResponse, current

WEB = ("http://", "https://")
_ATTEMPTS, _LONGEST_WAIT = 4, 20  # for each answer; seconds between attempts
_CONNECT_SECONDS, READ_SECONDS = 10, 30
_CONNECTIONS, _REDIRECTS = 64, 10
_PIECE = 2**20
_LATER = (408, 425, 429)  # statuses below 500 that are retried

_T = TypeVar("_T")


class Refused(UnfitItem):
    """The server does not give it."""


class Later(UnfitItem):
    """The server may deliver it later."""


def asked(
    url: str,
    read: Callable[[Any, str], _T],
    attempt: Attempt,
    headers: Mapping[str, str] | None = None,
) -> _T:
    """What `read` makes of the answer of a web server, redirects followed.

    read: reads or keeps the answer of a URL; tried again after `Later`, and if the connection
    breaks off. attempt: the first; each further one has as long. headers: of the request.

    Raises UnfitItem, what `read` raises, and NoWay.
    """
    try:
        from tenacity import (
            Retrying,
            retry_if_exception_type,
            sleep_using_event,
            stop_after_attempt,
            stop_when_event_set,
        )
        from tenacity import wait_random_exponential as growing
    except ImportError as cause:
        raise NoWay("input by URL needs more packages: install the extra [bulk]") from cause
    over = attempt.over
    attempts = Retrying(
        stop=stop_after_attempt(_ATTEMPTS) | stop_when_event_set(over),
        sleep=sleep_using_event(over),
        wait=growing(max=_LONGEST_WAIT),
        retry=retry_if_exception_type(Later),
        reraise=True,
    )
    return attempts(lambda: _asked(url, read, replace(attempt), headers or {}))


def _asked(
    url: str, read: Callable[[Any, str], _T], attempt: Attempt, headers: Mapping[str, str]
) -> _T:
    from urllib3.exceptions import HTTPError

    current.attempt = attempt
    if attempt.over.is_set():
        raise UnfitItem("it is not wanted any more")
    try:
        for _ in range(1 + _REDIRECTS):
            asks = {"User-Agent": "vignette", **_authorization(url), **headers}
            answer = _pool().request(
                "GET", url, headers=asks, redirect=False, preload_content=False
            )
            try:
                onward = answer.get_redirect_location()
                if not onward:
                    return read(answer, url)
                url = _led(url, onward)
            except BaseException:
                answer.close()
                raise
            answer.close()
    except ValueError as cause:  # a malformed URL, here or where it leads
        raise UnfitItem(f"the server can't be asked: {cause}") from cause
    except HTTPError as cause:
        if time.monotonic() >= attempt.end:
            raise UnfitItem(f"it was not there after {attempt.seconds} seconds") from cause
        raise Later(f"the server gave no whole answer: {cause}") from cause
    raise UnfitItem(f"the server led elsewhere more than {_REDIRECTS} times")


def _authorization(url: str) -> dict[str, str]:
    """The header for the name and password in a URL, if there are any."""
    known = urlsplit(url).netloc.rpartition("@")[0]
    name, _, password = map(unquote, known.partition(":"))
    basic = b64encode(f"{name}:{password}".encode()).decode()
    return {"Authorization": f"Basic {basic}"} if known else {}


def _led(url: str, onward: str) -> str:
    """Where a redirect leads, with the name and password in `url` if it is to the same server."""
    there = urljoin(url, onward)
    one, other = urlsplit(url), urlsplit(there)
    known, _, host = one.netloc.rpartition("@")
    if known and (one.scheme, host) == (other.scheme, other.netloc):
        there = urlunsplit(other._replace(netloc=one.netloc))
    return there


def check_status(answer: Any) -> None:
    """Raise Later or Refused unless an answer is 200."""
    if answer.status in _LATER or answer.status >= 500:
        raise Later(f"the server answered {answer.status}")
    if answer.status != 200:
        raise Refused(f"the server answered {answer.status}")


def content(answer: Any, url: str, limit: int) -> bytes:
    """The body of an answer, read to its end. Raises as `check_status` and `bounded` do."""
    try:
        check_status(answer)
        found = bounded(answer, limit, current.attempt.seconds)
        answer.drain_conn()
    finally:
        answer.close()
    return found


def bounded(stream: Any, limit: int, seconds: float) -> bytes:
    """All of a stream. Raises UnfitItem if it is longer than `limit` bytes, or takes longer."""
    found, end = io.BytesIO(), time.monotonic() + seconds
    while found.tell() <= limit and (piece := stream.read(_PIECE)):
        found.write(piece)
        if time.monotonic() > end:
            raise UnfitItem(f"it was not there after {seconds} seconds")
    if found.tell() > limit:
        raise UnfitItem(f"it has more than {limit / 1e6:g} MB (--max-image-mb)")
    return found.getvalue()


@cache
def _pool() -> Any:
    """The connection pool of all threads."""
    from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, Timeout
    from urllib3.connection import HTTPConnection, HTTPSConnection

    class Plain(HTTPConnectionPool):
        class ConnectionCls(HTTPConnection):
            response_class = TimedResponse

    class Secure(HTTPSConnectionPool):
        class ConnectionCls(HTTPSConnection):
            response_class = TimedResponse

    pool = PoolManager(
        maxsize=_CONNECTIONS,
        timeout=Timeout(connect=_CONNECT_SECONDS, read=READ_SECONDS),
        retries=False,
    )
    pool.pool_classes_by_scheme = {"http": Plain, "https": Secure}
    return pool
