"""Where rows go: what every kind of output promises, and lines of JSON, which most kinds begin as.

A row is there once `append` returned, whatever is killed then; a run that is given again finds it.
"""

import fcntl
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
from typing_extensions import override

from runtime.errors import VignetteError
from server.bulk.index import Index
from server.bulk.items import Outcome, ResultRow

_BEGINNING, _NEXT = b'{"id":"', (b'","caption":"', b'","error":"')  # of a row, spaces left out
_ID = re.compile(_BEGINNING + rb'(?:[^"\\]|\\.)*\\?')


class OutputConflict(VignetteError):
    """The output holds something else, or another run writes to it."""


class NotWritten(VignetteError):
    """A row can't be written where it belongs; nothing is wrong with the others."""


class Output(ABC):
    """Rows of a run, and of those before it."""

    @abstractmethod
    def rows(self) -> Iterator[ResultRow]:
        """All that are there, in their order; what a killed run left half written is removed.

        Read once, before anything else. Raises OutputConflict.
        """

    @abstractmethod
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        """Add a row. Raises NotWritten, OSError."""

    @abstractmethod
    def finish(self, index: Index) -> None:
        """All are there: put the output in its final form, each item's last row alone."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""


class Printed(Output):
    """Lines of JSON on standard output."""

    @override
    def rows(self) -> Iterator[ResultRow]:
        return iter(())

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        print(msgspec.json.encode(row).decode(), flush=True)

    @override
    def finish(self, index: Index) -> None:
        pass

    @override
    def close(self) -> None:
        pass


class Lines(Output):
    """A file of JSON lines, each written at once."""

    def __init__(self, path: Path) -> None:
        """Raises OutputConflict if another run writes to it, or for what is no regular file."""
        self.path = path
        self._stream = locked(path)

    @override
    def rows(self) -> Iterator[ResultRow]:
        """Raises OutputConflict for a line that is none of ours."""
        self._stream.seek(0)
        whole = 0
        for number, line in enumerate(self._stream, 1):
            ends = line.endswith(b"\n")
            if not ends and _torn(line):  # the last run was killed while it wrote this
                self._stream.truncate(whole)
                return
            yield row_of(line, f"{self.path}, line {number},")
            whole += len(line)
            if not ends:
                self._stream.write(b"\n")

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        self._stream.write(msgspec.json.encode(row) + b"\n")
        self._stream.flush()

    @override
    def finish(self, index: Index) -> None:
        if index.replaced:
            with replacing(self.path) as stream:
                for row in latest(self.rows(), index):
                    stream.write(msgspec.json.encode(row) + b"\n")

    @override
    def close(self) -> None:
        self._stream.close()

    def clear(self) -> None:
        """Its rows are elsewhere now."""
        self._stream.truncate(0)


def row_of(data: bytes, where: str) -> ResultRow:
    """A row that was written before. Raises OutputConflict for what is none of ours."""
    try:
        return msgspec.json.decode(data, type=ResultRow)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as cause:
        raise OutputConflict(f"{where} is no row of ours ({cause}): name another output") from cause


def _torn(line: bytes) -> bool:
    """Whether a line is the beginning of a row of ours, and not the whole of anything."""
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
    """The last row of each item. rows: all of the output."""
    return (row for number, row in enumerate(rows) if index.latest(row, number))


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file in the making, which takes the place of another when it is whole.

    What a killed run left of one goes; if it is a link, what that leads to is left alone.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_regular(path: Path) -> None:
    """Raise OutputConflict for a link, a pipe and the like."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputConflict(f"{path} is no regular file: remove it, or name another output")


def remove_empty(path: Path) -> None:
    """Of a file that is locked still, if nothing is in it."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()


def locked(path: Path) -> BinaryIO:
    """A file to read and append to.

    Raises OutputConflict if another run has it, or for what is no regular file.
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
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream
        stream.close()  # the other run has just put the whole file in its place
