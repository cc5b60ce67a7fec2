"""JSON lines, which most other outputs begin as."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from typing_extensions import override

from server.bulk.inputs.items import Outcome, ResultRow
from server.bulk.outputs.base import Output, OutputConflict, changed, latest
from server.bulk.outputs.files import is_at, locked, replacing
from server.bulk.outputs.index import Index

_BEGINNING, _NEXT = b'{"id":"', (b'","caption":"', b'","error":"')  # of a row, without spaces
_ID = re.compile(_BEGINNING + rb'(?:[^"\\]|\\.)*\\?')


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
        if size != self._size or not is_at(self.path, self._stream):
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
