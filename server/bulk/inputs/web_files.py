"""Lists, tables and shards on web servers."""

import io
import re
import zlib
from contextlib import closing
from dataclasses import replace
from functools import partial
from gzip import GzipFile
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.timed import Attempt, current
from server.bulk.inputs.web import Later, Refused, asked, check_status

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_AHEAD = 4 * 2**20  # bytes asked for at once where the last ones ended
_LEAST, _MOST = 2**16, 2**25  # bytes asked for at once elsewhere
_PIECE = 2**16  # bytes read at once if there are no ranges
_SECONDS, _SILENCE = 600, 120  # for a piece, and between two of its bytes
_RANGE, _EMPTY = re.compile(r"bytes (\d+)-(\d+)/(\d+)"), "bytes */0"
_NO_RANGES = (400, 416, 501)  # answers to ranges, of some servers that give none
_PACKED = {"gzip", "x-gzip", "deflate", "br", "zstd", "compress"}  # other encodings pack nothing
_SHARDS = (".gz", ".tgz")  # which are packed, whatever their server calls it
_CHANGED = "it changed while it was read, or its servers differ"


def opened(url: str) -> io.BufferedReader:
    """Open a file on a web server to read. Asks for nothing yet."""
    return io.BufferedReader(_WebFile(url), _PIECE)


class _NoRanges(Exception):
    """There are no parts of the file, or only those of it packed (Content-Encoding)."""


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
        self._version: tuple[str | None, ...] = (None, None)  # ETag, Last-Modified
        self._answer: Any = None  # of a server that gives no ranges
        self._stream: Any = None  # its content

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
        attempt, taken = Attempt(_SECONDS, _SILENCE), partial(self._taken, size=size)
        try:
            return asked(self._url, taken, attempt, ranged)
        except _NoRanges:
            return asked(self._url, partial(self._taken, size=None), replace(attempt), headers)
        except Refused:
            if self._url == self._given:
                raise
            self._url = self._given  # what it leads to may have expired
            return asked(self._url, taken, replace(attempt), ranged)

    def _taken(self, answer: Any, url: str, size: int | None) -> bytes:
        """Take an answer. size: of the part that was asked for; None: all was."""
        known, part = self._size is not None, str(answer.headers.get("Content-Range", ""))
        encodings = str(answer.headers.get("Content-Encoding", "")).lower().split(",")
        packed = _PACKED.intersection(encoding.strip() for encoding in encodings)
        if answer.status == 200 and not known and not self._at:
            self._answer = self._stream = answer
            if packed and packed <= {"gzip", "x-gzip"}:  # urllib3 would not notice that it is cut
                answer.decode_content = False
                self._stream = GzipFile(fileobj=answer, mode="rb")
            return b""
        with closing(answer):
            if answer.status == 416 and part == _EMPTY and not known:
                self._size = 0
                return b""
            unfit = answer.status == 206 and packed and not self._given.endswith(_SHARDS)
            if (unfit or answer.status in _NO_RANGES) and not known and size is not None:
                raise _NoRanges
            if answer.status == 416 and known:
                raise UnfitItem(_CHANGED)
            if answer.status != 206 or size is None:
                check_status(answer)
                raise Later("the server gave all of it in place of a part")
            if (given := _RANGE.fullmatch(part)) is None:
                raise UnfitItem("its server does not say how large it is: download the file")
            first, last, total = map(int, given.groups())
            if first != self._at or not first <= last < first + size:
                raise UnfitItem("its server gives other parts than it is asked for: download it")
            tag = answer.headers.get("ETag")
            told = tag and tag.removeprefix("W/"), answer.headers.get("Last-Modified")
            if (known and total != self._size) or _differ(told, self._version):
                raise UnfitItem(_CHANGED)
            found = bytes(answer.read(last - first + 2, decode_content=False))
            if len(found) != last - first + 1:
                raise Later("the server gave more or less than it said")
        self._version = tuple(new or old for new, old in zip(told, self._version, strict=True))
        self._size, self._url = total, url
        return found

    def _streamed(self, size: int) -> bytes:
        from urllib3.exceptions import HTTPError

        current.attempt = Attempt(_SECONDS, _SILENCE)
        try:
            return bytes(self._stream.read1(size))  # what is there, unless it is packed
        except (HTTPError, OSError, EOFError, zlib.error) as cause:
            raise UnfitItem(f"the server gave no whole answer: {cause}") from cause

    @override
    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        super().close()


def _differ(one: tuple[str | None, ...], other: tuple[str | None, ...]) -> bool:
    """Whether two answers tell of different versions; some servers leave out what others tell."""
    pairs = zip(one, other, strict=True)
    return any(a != b for a, b in pairs if a is not None and b is not None)
