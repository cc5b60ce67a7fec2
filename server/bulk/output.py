"""The interface of all outputs, and JSON lines, which most other outputs begin as.

Once `append` has returned, a row survives a kill of the process, and a repeated run finds it.
"""

import fcntl
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import BinaryIO

import msgspec
from typing_extensions import override

from runtime.errors import VignetteError
from server.bulk.index import Index
from server.bulk.items import Outcome, ResultRow

_BEGINNING, _NEXT = b'{"id":"', (b'","caption":"', b'","error":"')  # of a row, without spaces
_ID = re.compile(_BEGINNING + rb'(?:[^"\\]|\\.)*\\?')


class OutputConflict(VignetteError):
    """The output holds something other than our rows, or another run writes to it."""


class NotWritten(VignetteError):
    """One row can't be written where it belongs; other rows can."""


class Output(ABC):
    """Rows of a run, and of earlier runs."""

    @abstractmethod
    def rows(self) -> Iterator[ResultRow]:
        """All rows, in order; one that a killed run left half-written is removed.

        Called once, before anything else. Raises OutputConflict.
        """

    @abstractmethod
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        """Add a row. Raises NotWritten, OSError."""

    @abstractmethod
    def finish(self, index: Index) -> None:
        """Put the output in its final form, with only the last row of each item."""

    @abstractmethod
    def close(self) -> None:
        """Close and unlock the files."""


class Printed(Output):
    """Lines of JSON, in UTF-8, on standard output."""

    def __init__(self) -> None:
        """Raises OutputConflict if standard output is closed."""
        if sys.stdout is None:
            raise OutputConflict("standard output is closed: name an --output")

    @override
    def rows(self) -> Iterator[ResultRow]:
        return iter(())

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(row) + b"\n")
        sys.stdout.flush()

    @override
    def finish(self, index: Index) -> None:
        pass

    @override
    def close(self) -> None:
        pass


class Lines(Output):
    """A file of JSON lines, each flushed as it is appended."""

    def __init__(self, path: Path) -> None:
        """Raises OutputConflict if another run writes to it, or it is no regular file."""
        self.path = path
        self._stream = locked(path)
        self._size = 0  # bytes of whole rows

    @override
    def rows(self) -> Iterator[ResultRow]:
        """Raises OutputConflict for a line that is no row of ours."""
        self._stream.seek(0)
        self._size = 0
        for number, line in enumerate(self._stream, 1):
            ends = line.endswith(b"\n")
            if not ends and _torn(line):  # the last run was killed while writing this
                self._stream.truncate(self._size)
                return
            yield row_of(line, f"{self.path}, line {number},")
            self._size += len(line)
            if not ends:
                self._size += self._stream.write(b"\n")

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        self._size += self._stream.write(msgspec.json.encode(row) + b"\n")
        self._stream.flush()

    @override
    def finish(self, index: Index) -> None:
        """Raises OutputConflict if the file was changed or moved meanwhile."""
        size = os.fstat(self._stream.fileno()).st_size
        if size != self._size or not _is_at(self.path, self._stream):
            raise changed(self.path)
        if index.replaced:
            with replacing(self.path) as stream:
                for row in latest(self.rows(), index):
                    stream.write(msgspec.json.encode(row) + b"\n")

    @override
    def close(self) -> None:
        self._stream.close()

    def clear(self) -> None:
        """Remove all rows, which are in another file now."""
        self._stream.truncate(0)
        self._size = 0


def row_of(data: bytes, where: str) -> ResultRow:
    """Decode a row. Raises OutputConflict if it is none of ours."""
    try:
        return msgspec.json.decode(data, type=ResultRow)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as cause:
        raise OutputConflict(f"{where} is no row of ours ({cause}): name another output") from cause


def _torn(line: bytes) -> bool:
    """Whether a line is the beginning of a row of ours, and no complete JSON."""
    try:
        msgspec.json.decode(line)
        return False
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    line = line.replace(b" ", b"")
    if (found := _ID.match(line)) is None:
        return _BEGINNING.startswith(line)
    rest = line[found.end() :]
    return any(rest.startswith(each[: len(rest)]) for each in _NEXT)


def latest(rows: Iterable[ResultRow], index: Index) -> Iterator[ResultRow]:
    """The last row of each item. rows: all rows of the output. Raises OutputConflict if some are
    missing.
    """
    count = 0
    for count, row in enumerate(rows, 1):
        if index.latest(row, count - 1):
            yield row
    if count != index.rows:
        raise changed("the output")


def changed(what: Path | str) -> OutputConflict:
    """The error for rows that are no longer where they were written."""
    return OutputConflict(
        f"{what} was removed, moved or changed during the run: rows are missing there; give the "
        "command again"
    )


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path`, with its permissions, when it is complete.

    One left by a killed run is removed; if that is a link, its target is left alone.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as stream:
            if path.exists():
                os.fchmod(stream.fileno(), S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_regular(path: Path) -> None:
    """Raise OutputConflict if the path exists and is no regular file, such as a link or pipe."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputConflict(f"{path} is no regular file: remove it, or name another output")


def remove_empty(path: Path) -> None:
    """Remove a file that is still locked, if it is empty."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()


def locked(path: Path) -> BinaryIO:
    """Open and lock a file to read and append to.

    Raises OutputConflict if another run has it, or it is no regular file.
    """
    while True:
        check_regular(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        stream = os.fdopen(os.open(path, flags, 0o666), "a+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise OutputConflict(f"another run writes to {path}: name another output") from None
        if _is_at(path, stream):
            return stream
        stream.close()  # another run has just replaced the file


def _is_at(path: Path, stream: BinaryIO) -> bool:
    """Whether an open file is still the one that its path names."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))
