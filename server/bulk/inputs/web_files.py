"""Lists, tables and shards on web servers."""

import io
import re
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.timed import Attempt, current
from server.bulk.inputs.web import READ_SECONDS, Later, asked, check_status

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_AHEAD = 4 * 2**20  # bytes asked for at once where the last ones ended
_LEAST, _MOST = 2**16, 2**25  # bytes asked for at once elsewhere
_PIECE = 2**16  # bytes read at once if there are no ranges
_SECONDS = 600  # for a piece
_RANGE, _EMPTY = re.compile(r"bytes (\d+)-(\d+)/(\d+)"), "bytes */0"
_CHANGED = "it changed while it was read"


def opened(url: str) -> io.BufferedReader:
    """Open a file on a web server to read. Asks for nothing yet."""
    return io.BufferedReader(_WebFile(url), _PIECE)


class _Packed(Exception):
    """A part is one of the packed file (Content-Encoding), whose bytes are not the file's."""


class _WebFile(io.RawIOBase):
    """A file that is read in ranges, all of one version; from a server that gives none, from its
    start to its end.

    Reading raises UnfitItem, also if the file changed or is shorter than its server said.
    """

    def __init__(self, url: str) -> None:
        self._given = self._url = url  # redirects lead elsewhere
        self._at = 0
        self._first, self._read = 0, b""  # what was read last, and where it began
        self._size: int | None = None
        self._version: tuple[object, ...] = ()
        self._stream: Any = None  # the answer of a server that gives no ranges

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size is None:
            self._part(1)  # tells the size
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        if self._stream is not None and (whence == io.SEEK_END or start + offset != self._at):
            raise UnfitItem("its server gives no parts of it: download the file")
        self._at = start + offset
        return self._at

    @override
    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        end = self._first + len(self._read)
        if self._stream is None and not self._first <= self._at < end:
            size = _AHEAD if self._at == end else min(_MOST, max(_LEAST, len(view)))
            self._first, self._read = self._at, self._part(size)
        if self._stream is None:
            start = self._at - self._first
            piece = self._read[start : start + len(view)]
        else:
            piece = self._streamed(min(len(view), _PIECE))
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _part(self, size: int) -> bytes:
        """Some of the next bytes, at least one before the end; none if `_stream` has them."""
        if self._size is not None:
            size = min(size, self._size - self._at)
        if size <= 0:
            return b""
        headers = {"Accept-Encoding": "identity"}
        ranged = headers | {"Range": f"bytes={self._at}-{self._at + size - 1}"}
        attempt, taken = Attempt(_SECONDS, READ_SECONDS), partial(self._taken, size=size)
        try:
            return asked(self._url, taken, attempt, ranged)
        except _Packed:
            return asked(self._url, taken, replace(attempt), headers)
        except UnfitItem:
            if self._url == self._given:
                raise
            self._url = self._given  # what it leads to may have expired
            return asked(self._url, taken, replace(attempt), ranged)

    def _taken(self, answer: Any, url: str, size: int) -> bytes:
        known, told = self._size is not None, str(answer.headers.get("Content-Range", ""))
        if answer.status == 200 and not known and not self._at:
            self._stream = answer
            return b""
        with closing(answer):
            if answer.status == 416 and told == _EMPTY and not known:
                self._size = 0
                return b""
            if answer.status == 416 and known:
                raise UnfitItem(_CHANGED)
            if answer.status != 206:
                check_status(answer)
                raise Later("the server gave all of it in place of a part")
            if (given := _RANGE.fullmatch(told)) is None:
                raise UnfitItem("its server does not say how large it is: download the file")
            if answer.headers.get("Content-Encoding", "identity") != "identity" and not known:
                raise _Packed
            first, last, total = map(int, given.groups())
            if first != self._at or not first <= last < first + size:
                raise UnfitItem("its server gives other parts than it is asked for: download it")
            version = total, answer.headers.get("ETag"), answer.headers.get("Last-Modified")
            if known and version != self._version:
                raise UnfitItem(_CHANGED)
            found = bytes(answer.read(last - first + 2, decode_content=False))
            if len(found) != last - first + 1:
                raise Later("the server gave more or less than it said")
        self._size, self._version, self._url = total, version, url
        return found

    def _streamed(self, size: int) -> bytes:
        from urllib3.exceptions import HTTPError

        current.attempt = Attempt(_SECONDS, READ_SECONDS)
        try:
            return bytes(self._stream.read(size, decode_content=True))
        except HTTPError as cause:
            raise UnfitItem(f"the server gave no whole answer: {cause}") from cause

    @override
    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        super().close()
