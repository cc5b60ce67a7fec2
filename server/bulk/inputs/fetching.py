"""The bytes of an image, a list or a shard, from a path or from any URL that fsspec knows."""

import stat
import threading
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from server.bulk.inputs import web_files
from server.bulk.inputs.items import NoWay, UnfitItem
from server.bulk.inputs.timed import Attempt
from server.bulk.inputs.web import READ_SECONDS, WEB, asked, bounded, content

_SECONDS = 120  # for an image


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
    """Open a path or URL to read. Raises OSError, NoWay, and what its file system raises; so does
    reading, and UnfitItem for a file of a web server.
    """
    if not is_url(location):
        return Path(location).open("rb")
    if location.startswith(WEB):
        return web_files.opened(location)
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
        attempt = Attempt(_SECONDS, READ_SECONDS, over or threading.Event())
        return asked(location, partial(content, limit=limit), attempt)
    if is_url(location) and "::" in location.partition("://")[0]:
        raise UnfitItem("a URL within another is not taken")  # it may fill the temporary folder
    location = as_path(location)  # fsspec would wait for a pipe's writer
    if not is_url(location) and not stat.S_ISREG(Path(location).stat().st_mode):
        raise UnfitItem(f"{location} is no regular file")  # opening a pipe would wait for a writer
    with opened(location) as stream:
        return bounded(stream, limit, _SECONDS)
