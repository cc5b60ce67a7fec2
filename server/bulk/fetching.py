"""The bytes of an image, from a path or from any URL that fsspec knows."""

import io
import time
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import VignetteError

_ATTEMPTS, _LONGEST_WAIT = 4, 20  # of one image over HTTP; seconds before another
_CONNECT_SECONDS, _READ_SECONDS, _SECONDS = 10, 30, 120  # of one attempt
_CONNECTIONS, _REDIRECTS = 64, 5
_PIECE = 2**20
_LATER = (408, 425, 429)  # of the statuses below 500


class TooLarge(VignetteError):
    """An image has more bytes than one may have."""


class NoWay(VignetteError):
    """A package is missing that reads URLs of this kind."""


class NotGiven(VignetteError):
    """A server did not give an image."""


class _Later(NotGiven):
    """It may do so another time."""


def is_url(location: str) -> bool:
    """Whether it is elsewhere."""
    return "://" in location or location.startswith("data:")


def opened(location: str) -> AbstractContextManager[BinaryIO]:
    """A file to read, local or by URL. Raises OSError, NoWay, and what its file system raises."""
    if not is_url(location):
        return Path(location).open("rb")
    try:
        import fsspec

        return fsspec.open(location, "rb")
    except (ImportError, ValueError) as cause:  # a protocol without its package, or without a name
        raise NoWay(f"{location} can't be opened: {cause}") from cause


def fetch(location: str, limit: int) -> bytes:
    """An image's bytes. What a web server may give later is asked for again; file systems of
    fsspec do so themselves.

    Raises TooLarge above `limit` bytes, NotGiven, and what `opened` raises.
    """
    if location.startswith(("http://", "https://")):
        return _fetched(location, limit)
    with opened(location) as stream:
        return _bounded(stream, limit)


def _fetched(url: str, limit: int) -> bytes:
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt
    from tenacity import wait_random_exponential as growing

    attempts = Retrying(
        stop=stop_after_attempt(_ATTEMPTS),
        wait=growing(max=_LONGEST_WAIT),
        retry=retry_if_exception_type(_Later),
        reraise=True,
    )
    return attempts(_asked, url, limit)


def _asked(url: str, limit: int) -> bytes:
    from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError

    try:
        answer = _pool().request("GET", url, preload_content=False)
        try:
            if answer.status in _LATER or answer.status >= 500:
                raise _Later(f"the server answered {answer.status}")
            if answer.status != 200:
                raise NotGiven(f"the server answered {answer.status}")
            content = _bounded(answer, limit)
            answer.drain_conn()
            return content
        finally:
            answer.close()
    except (LocationValueError, MaxRetryError) as cause:
        kind = NotGiven if isinstance(cause, LocationValueError) else _Later
        raise kind(f"the server can't be asked: {getattr(cause, 'reason', cause)}") from cause
    except HTTPError as cause:
        raise _Later(f"the server's answer broke off: {cause}") from cause


@cache
def _pool() -> Any:
    """Connections, for all threads."""
    from urllib3 import PoolManager, Retry, Timeout

    return PoolManager(
        maxsize=_CONNECTIONS,
        headers={"User-Agent": "vignette"},
        timeout=Timeout(connect=_CONNECT_SECONDS, read=_READ_SECONDS),
        retries=Retry(None, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS),
    )


def _bounded(stream: Any, limit: int) -> bytes:
    content, end = io.BytesIO(), time.monotonic() + _SECONDS
    while content.tell() <= limit and (piece := stream.read(_PIECE)):
        content.write(piece)
        if time.monotonic() > end:
            raise NotGiven(f"it was not there after {_SECONDS} seconds")
    if content.tell() > limit:
        raise TooLarge(f"it has more than {limit / 1e6:g} MB (--max-image-mb)")
    return content.getvalue()
