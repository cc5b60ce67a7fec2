"""What was asked for under an id: the image and the question, to tell it from another."""

import os
from hashlib import blake2b, sha256
from pathlib import Path

from server.bulk.fetching import as_path, is_url
from server.bulk.folders import plain
from server.bulk.items import Item, ResultRow

KEY_BYTES = 16
_UNKNOWN = None, None


def key(*texts: str) -> bytes:
    """A digest of texts, KEY_BYTES long."""
    return blake2b(
        "\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES
    ).digest()


def of_item(item: Item, prompt: str | None, digest: str | None = None) -> bytes:
    """The key by which a row of the item is known; empty for an item without an image.

    prompt: the run's, for items without one. digest: SHA-256 of an image that the input holds, in
    place of the image.
    """
    said = item.prompt or prompt or ""
    if item.wrong is not None:
        return b""
    if isinstance(item.image, bytes):
        return key(item.id, "content", digest or sha256(item.image).hexdigest(), said)
    return key(item.id, "location", _absolute(location(item)), said)


def of_row(row: ResultRow) -> tuple[bytes, bytes]:
    """Keys of the items whose row this is: one names the image, or holds it."""
    said = row.prompt or ""
    located = key(row.id, "location", _absolute(row.path or row.id), said)
    return located, key(row.id, "content", row.sha256 or "", said)


def location(item: Item) -> str:
    """Path or URL of an item's image, as rows have it: of a data URI only a digest."""
    assert isinstance(item.image, str)
    if item.image.startswith("data:"):
        return f"data:sha256,{sha256(item.image.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return plain(item.image)


def state(image: bytes | str) -> tuple[int | None, int | None]:
    """Size (bytes) and modification time (ns) of a local file, to detect changes."""
    if isinstance(image, bytes) or is_url(image):
        return _UNKNOWN
    try:
        found = Path(image).stat()
    except (OSError, ValueError):  # ValueError: not a valid file name
        return _UNKNOWN
    return found.st_size, found.st_mtime_ns


def _absolute(where: str) -> str:
    where = as_path(where)
    return where if is_url(where) else os.path.abspath(where)  # noqa: PTH100
