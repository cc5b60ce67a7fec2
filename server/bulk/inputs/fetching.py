"""The bytes of an image, from a path or from any URL that fsspec knows."""

import io
import re
import stat
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin

from runtime.errors import VignetteError
from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.timed import Attempt, TimedResponse, current

_ATTEMPTS, _LONGEST_WAIT = 4, 20  # per image over HTTP; seconds between attempts
_CONNECT_SECONDS, _READ_SECONDS, _SECONDS = 10, 30, 120  # of one attempt
_PAGE_SECONDS = 600  # likewise, of a page that lists a folder, which may be long in the making
_CONNECTIONS, _REDIRECTS = 64, 5
_PIECE = 2**20
WEB = ("http://", "https://")
# Of web pages: Python knows others, some of which take the square of a text's length to decode.
_CHARSETS = re.compile("iso-8859-|windows-|shift_jis|euc-|gb|big5|koi8-")
_PAGES = ("text/html", "application/xhtml+xml")
_LATER = (408, 425, 429)  # statuses below 500 that are retried

_T = TypeVar("_T")


class NoWay(VignetteError):
    """No installed package reads input of this kind."""


class _Later(UnfitItem):
    """The server may deliver it later."""


def as_path(location: str) -> str:
    """The path in a URL of this machine's files; any other location as it is."""
    return location.removeprefix("file://").removeprefix("local://")


def is_url(location: str) -> bool:
    """Whether a location is a URL, not a path."""
    return "://" in location or location.startswith("data:")


def is_relative(location: str) -> bool:
    """Whether a location depends on the working directory."""
    path = as_path(location)
    return not (is_url(path) or Path(path).is_absolute())


def opened(location: str) -> AbstractContextManager[BinaryIO]:
    """Open a path or URL to read. Raises OSError, NoWay, and what its file system raises."""
    if not is_url(location):
        return Path(location).open("rb")
    try:
        import fsspec

        return fsspec.open(location, "rb")
    except (ImportError, ValueError) as cause:  # a protocol without its package, or unknown
        raise NoWay(f"{location} can't be opened: {cause}") from cause


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Raises NoWay."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as cause:
        raise NoWay(f"{url} can't be opened: {cause}") from cause


def fetch(location: str, limit: int, over: threading.Event | None = None) -> bytes:
    """An image's bytes. Temporary failures over HTTP are retried; file systems of fsspec retry
    by themselves.

    over: once it is set, the image is not wanted any more.

    Raises UnfitItem, also above `limit` bytes, and what `opened` raises.
    """
    if location.startswith(WEB):
        attempt = Attempt(_SECONDS, _READ_SECONDS, over or threading.Event())
        return _fetched(location, limit, attempt, _content)
    if is_url(location) and "::" in location.partition("://")[0]:
        raise UnfitItem("a URL within another is not taken")  # it may fill the temporary folder
    location = as_path(location)  # fsspec would wait for a pipe's writer
    if not is_url(location) and not stat.S_ISREG(Path(location).stat().st_mode):
        raise UnfitItem(f"{location} is no regular file")  # opening a pipe would wait for a writer
    with opened(location) as stream:
        return _bounded(stream, limit, _SECONDS)


def fetch_page(url: str, limit: int) -> str:
    """A web page, or nothing for what is none. Raises UnfitItem and NoWay, as `fetch` does."""
    return _fetched(url, limit, Attempt(_PAGE_SECONDS, _PAGE_SECONDS), _text)


def _fetched(url: str, limit: int, attempt: Attempt, read: Callable[[Any, int], _T]) -> _T:
    """What `read` makes of the answer. attempt: the first; each further one begins anew."""
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
        raise NoWay("images by URL need more packages: install the extra [bulk]") from cause
    over = attempt.over
    attempts = Retrying(
        stop=stop_after_attempt(_ATTEMPTS) | stop_when_event_set(over),
        sleep=sleep_using_event(over),
        wait=growing(max=_LONGEST_WAIT),
        retry=retry_if_exception_type(_Later),
        reraise=True,
    )
    return attempts(_asked, url, limit, attempt, read)


def _asked(url: str, limit: int, attempt: Attempt, read: Callable[[Any, int], _T]) -> _T:
    from urllib3.exceptions import HTTPError, LocationValueError

    current.attempt = attempt = replace(attempt)
    if attempt.over.is_set():
        raise UnfitItem("it is not wanted any more")
    try:
        for _ in range(1 + _REDIRECTS):
            with closing(
                _pool().request("GET", url, redirect=False, preload_content=False)
            ) as answer:
                onward = answer.get_redirect_location()
                if not onward:
                    return read(answer, limit)
                url = urljoin(url, onward)
    except LocationValueError as cause:
        raise UnfitItem(f"the server can't be asked: {cause}") from cause
    except HTTPError as cause:
        if time.monotonic() >= attempt.end:
            raise UnfitItem(f"it was not there after {attempt.seconds} seconds") from cause
        raise _Later(f"the server gave no whole answer: {cause}") from cause
    raise UnfitItem(f"the server led elsewhere more than {_REDIRECTS} times")


def _content(answer: Any, limit: int) -> bytes:
    if answer.status in _LATER or answer.status >= 500:
        raise _Later(f"the server answered {answer.status}")
    if answer.status != 200:
        raise UnfitItem(f"the server answered {answer.status}")
    content = _bounded(answer, limit, current.attempt.seconds)
    answer.drain_conn()
    return content


def _text(answer: Any, limit: int) -> str:
    kind, _, parameters = str(answer.headers.get("Content-Type", _PAGES[0])).partition(";")
    if answer.status == 200 and kind.strip().lower() not in _PAGES:
        return ""
    content = _content(answer, limit)
    charset = parameters.lower().partition("charset=")[2].strip(" \"'")
    try:
        return content.decode(charset if _CHARSETS.match(charset) else "utf-8", "replace")
    except LookupError:
        return content.decode(errors="replace")


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
        headers={"User-Agent": "vignette"},
        timeout=Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        retries=False,
    )
    pool.pool_classes_by_scheme = {"http": Plain, "https": Secure}
    return pool


def _bounded(stream: Any, limit: int, seconds: float) -> bytes:
    content, end = io.BytesIO(), time.monotonic() + seconds
    while content.tell() <= limit and (piece := stream.read(_PIECE)):
        content.write(piece)
        if time.monotonic() > end:
            raise UnfitItem(f"it was not there after {seconds} seconds")
    if content.tell() > limit:
        raise UnfitItem(f"it has more than {limit / 1e6:g} MB (--max-image-mb)")
    return content.getvalue()
