"""Keys by which the row of an item is found again: of its id, its image and its question."""

import os
import re
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from urllib.parse import urlsplit

from server.bulk.inputs.fetching import as_path, is_url
from server.bulk.inputs.folders import plain
from server.bulk.inputs.items import Item, ResultRow

KEY_BYTES = 16
_UNKNOWN = None, None
_AZURE = re.compile("(sig|s[eprtv]|spr|sip|ss|srt|sk[etsv]|sk[ot]id|scid)$")
# Parameters of signed URLs, which are others each time, by those that tell the kind of signature.
_SIGNATURES = {
    ("x-amz-signature",): re.compile("x-amz-"),
    ("x-goog-signature",): re.compile("x-goog-"),
    ("x-oss-signature",): re.compile(
        "x-oss-(signature|credential|date|expires|security-token|additional-headers)"
    ),
    ("signature",): re.compile(
        "(signature|expires|awsaccesskeyid|googleaccessid|ossaccesskeyid|key-pair-id|policy|"
        "(x-amz-)?security-token)$"
    ),
    ("sig", "sv"): _AZURE,
    ("sig", "se"): _AZURE,
}


def key(*texts: str) -> bytes:
    """A digest of texts, KEY_BYTES long."""
    return blake2b(
        "\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES
    ).digest()


def of_item(item: Item, digest: str | None = None) -> bytes:
    """The key by which a row of the item is known; empty for an item without an image.

    digest: SHA-256 of an image that the input holds, in place of the image.
    """
    said = item.prompt or ""
    if item.wrong is not None:
        return b""
    if isinstance(item.image, bytes):
        return key(item.id, "content", digest or sha256(item.image).hexdigest(), said)
    return key(item.id, "location", _canonical(location(item)), said)


def of_row(row: ResultRow) -> bytes:
    """Keys, joined, of the items whose row this is: one names the image, or holds it."""
    said = row.prompt or ""
    keys = key(row.id, "location", _canonical(row.path or row.id), said)
    return keys if row.sha256 is None else keys + key(row.id, "content", row.sha256, said)


def location(item: Item) -> str:
    """Path or URL of an item's image, as rows have it: absolute where the id is another, as a later
    run may have another working directory; of a data URI only a digest.
    """
    assert isinstance(item.image, str)
    if item.image.startswith("data:"):
        return f"data:sha256,{sha256(item.image.encode('utf-8', 'surrogatepass')).hexdigest()}"
    named = plain(item.image)
    return named if named == item.id or is_url(item.image) else plain(_real(item.image))


def state(image: bytes | str) -> tuple[int | None, int | None]:
    """Size (bytes) and modification time (ns) of a local file, to detect changes."""
    if isinstance(image, bytes) or is_url(path := as_path(image)):
        return _UNKNOWN
    try:
        found = Path(path).stat()
    except (OSError, ValueError):  # ValueError: not a valid file name
        return _UNKNOWN
    return found.st_size, found.st_mtime_ns


def _canonical(where: str) -> str:
    """A location however it is spelled: by links, from another folder, with another signature."""
    where = as_path(where)
    if not is_url(where):
        return _real(where)
    try:
        parts = urlsplit(where)
    except ValueError:  # an id may look like a URL
        return where
    query = {part: part.partition("=")[0].lower() for part in parts.query.split("&")}
    for signs, theirs in _SIGNATURES.items():
        if set(signs) <= set(query.values()):
            query = {part: name for part, name in query.items() if not theirs.match(name)}
    fragment = "" if parts.scheme in ("http", "https") else parts.fragment  # else of a key
    asked = "&".join(sorted(query, key=query.__getitem__))
    return parts._replace(query=asked, fragment=fragment).geturl()


def _real(path: str) -> str:
    folder, name = os.path.split(path)
    if "\0" in folder:  # no path: its row will say so
        return path
    return os.path.join(_real_folder(os.path.abspath(folder)), name)  # noqa: PTH100, PTH118


_real_folder = lru_cache(4096)(os.path.realpath)
