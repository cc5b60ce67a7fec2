"""Folders of a web server, as the pages tell that list them."""

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urldefrag, urljoin, urlsplit

from typing_extensions import override

from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.timed import Attempt
from server.bulk.inputs.web import asked, content

_PAGE = 256 * 2**20  # bytes: a folder of a million images fits
_SECONDS = 600  # for a page, which may be long in the making
# Of pages: Python knows others, some of which take the square of a text's length to decode.
_CHARSETS = re.compile("iso-8859-|windows-|shift_jis|euc-|gb|big5|koi8-")
_PAGES = ("text/html", "application/xhtml+xml")
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
        url = self._given if base == self._base else base
        if base == self._base and self._seen is not None:
            seen, self._seen = self._seen, None
            return seen
        page = _Links()
        try:
            page.feed(asked(url, _text, Attempt(_SECONDS, _SECONDS)))
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


def _text(answer: Any, url: str) -> str:
    """A web page, or nothing for what is none."""
    kind, _, parameters = str(answer.headers.get("Content-Type", _PAGES[0])).partition(";")
    if answer.status == 200 and kind.strip().lower() not in _PAGES:
        answer.close()
        return ""
    page = content(answer, url, _PAGE)
    charset = parameters.lower().partition("charset=")[2].strip(" \"'")
    try:
        return page.decode(charset if _CHARSETS.match(charset) else "utf-8", "replace")
    except LookupError:
        return page.decode(errors="replace")


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
