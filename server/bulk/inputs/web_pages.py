"""Folders of a web server, as the pages tell that list them."""

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from typing_extensions import override

from server.bulk.inputs.fetching import fetch_page
from server.bulk.inputs.items import UnfitItem

_PAGE = 256 * 2**20  # bytes: a folder of a million images fits
_PLAIN = re.compile(r"[\w%~-][\w.%~+,-]*/?", re.ASCII)  # links that are names


class WebPages:
    """Like a file system of fsspec, whose own for HTTP drops links of some forms."""

    def __init__(self, given: str) -> None:
        """given: the URL of a folder as it is to be asked for; others end in a slash."""
        self._given, self._base = given, given.rstrip("/") + "/"
        self._seen: list[dict[str, Any]] | None = None  # of the given URL, until it is listed

    def ls(self, folder: str, detail: bool = True) -> list[dict[str, Any]]:
        """What the page of a folder links to below it, at any depth. Raises UnfitItem, NoWay."""
        base = folder.rstrip("/") + "/"
        asked = self._given if base == self._base else base
        if base == self._base and self._seen is not None:
            seen, self._seen = self._seen, None
            return seen
        page = _Links()
        try:
            page.feed(fetch_page(asked, _PAGE))
        except (ValueError, AssertionError) as cause:  # of odd declarations and entities
            raise UnfitItem(f"the page can't be taken apart: {cause}") from cause
        found = dict.fromkeys(_below(base, link) for link in page.links)
        return [
            {"name": url, "type": "directory" if url.endswith("/") else "file"}
            for url in found
            if url is not None
        ]

    def isdir(self, url: str) -> bool:
        """Whether there is a page with links to what is below it."""
        try:
            self._seen = self.ls(url)
        except UnfitItem:
            return False
        return bool(self._seen)

    def unstrip_protocol(self, url: str) -> str:
        """The URL."""
        return url


def _below(base: str, link: str) -> str | None:
    """The URL of a link, if it leads below the folder `base`; also by https in place of http."""
    if _PLAIN.fullmatch(link):
        return base + link
    try:
        ours = urlsplit(urljoin(base, "."))
        theirs = urlsplit(urldefrag(urljoin(base, link.strip())).url)
    except ValueError:  # a malformed URL
        return None
    same = theirs.scheme in ("http", "https") and theirs.hostname == ours.hostname
    if not (same and theirs.path.startswith(ours.path) and theirs.path != ours.path):
        return None  # also those that sort the page
    query = f"?{theirs.query}" if theirs.query else ""
    return base + theirs.path.removeprefix(ours.path) + query


class _Links(HTMLParser):
    """links: of a page, as they are written, but for entities."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if (tag, name) == ("a", "href") and value]
