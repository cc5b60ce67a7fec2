"""Rows of lists and tables, streamed. An unreadable row yields a BrokenRow in its place."""

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from runtime.errors import VignetteError
from server.bulk.inputs.items import NoWay

IMAGE = "image"  # the column of a list without column names

_LONGEST_LINE = 64 * 2**20  # a data URI of an image fits
_PIECE = 2**20  # bytes of a Parquet column read at a time
_ROWS = 8  # of a Parquet file, held at a time: they may be large images
_LARGE = 64 * 2**20  # bytes of a row group, above which rows are read singly: any may be as large
csv.field_size_limit(_LONGEST_LINE)

Check = Callable[[Iterable[str]], object]  # is given the column names


class BrokenRow(VignetteError):
    """A row can't be read, or names no image."""


Rows = Iterator[tuple[int, Mapping[str, Any] | BrokenRow]]


def lines(stream: Any) -> Rows:
    """Rows of a file with a path or URL a line."""
    for number, line in _bounded(stream):
        if isinstance(line, BrokenRow):
            yield number, line
        elif name := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n"):
            yield number, {IMAGE: name.decode("utf-8", "surrogateescape")}


def json_rows(stream: Any) -> Rows:
    """Rows of JSON lines."""
    for number, line in _bounded(stream):
        if isinstance(line, BrokenRow):
            yield number, line
        elif line.strip():
            yield number, _object(line)


def csv_rows(stream: Any, check: Check) -> Rows:
    """Rows of CSV. Raises csv.Error and BrokenRow for an unreadable header."""
    read = 0  # characters since the last row: a row may have many lines
    over = False

    def counted(numbered: tuple[int, str | BrokenRow]) -> str:
        nonlocal read
        _, text = numbered
        if isinstance(text, BrokenRow):
            raise text
        read += len(text)
        if read > _LONGEST_LINE:
            raise BrokenRow(f"this row has over {_LONGEST_LINE // 2**20} MiB")
        return text

    def end() -> Iterator[str]:
        nonlocal over
        over = True
        yield from ()

    with io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.DictReader(chain(map(counted, _bounded(text)), end()))
        check(reader.fieldnames or ())
        number, ended = 0, False
        while not ended:
            number, read = number + 1, 0
            try:
                row = next(reader)
                # The reader asks for more within quotes only, and takes the end for that of a row.
                yield number, BrokenRow("a quote in it is never closed") if over else row
            except StopIteration:
                ended = True
            except (csv.Error, BrokenRow) as error:
                yield number, BrokenRow(str(error))


class Table(NamedTuple):
    """What tells one Parquet file from another. digest: SHA-256 of its metadata, which has places,
    sizes and extremes of all columns.
    """

    groups: int
    digest: bytes


def table_of(file: Any) -> Table:
    """What a `ParquetFile` is like."""
    metadata = io.BytesIO()
    file.metadata.write_metadata_file(metadata)
    return Table(file.num_row_groups, hashlib.sha256(metadata.getvalue()).digest())


def parquet_rows(
    stream: Any,
    check: Check,
    columns: Sequence[str],
    part: int | None = None,
    table: Table | None = None,
) -> Rows:
    """Rows of Parquet. part: the only row group to read. table: what the file is to be like.

    Raises OSError for another file, and if rows can't be read.
    """
    # By default a row group's columns are read whole, and it may be the whole file.
    file = parquet().ParquetFile(stream, pre_buffer=False, buffer_size=_PIECE)
    if table is not None and table_of(file) != table:
        raise OSError("it changed while it was read")
    check(file.schema_arrow.names)
    groups = range(file.num_row_groups) if part is None else [part]
    number = ends = sum(file.metadata.row_group(g).num_rows for g in range(part or 0))
    for group in groups:
        large = file.metadata.row_group(group).total_byte_size > _LARGE
        for batch in file.iter_batches(1 if large else _ROWS, [group], columns):
            for index in range(batch.num_rows):
                number += 1
                yield number, _cells(batch.slice(index, 1))
        if number != (ends := ends + file.metadata.row_group(group).num_rows):
            raise OSError(f"row group {group} has rows that can't be read: {ends - number}")


def parquet() -> Any:
    """The module `pyarrow.parquet`. Raises NoWay without it."""
    try:
        import pyarrow.parquet
    except ImportError as cause:
        raise NoWay("Parquet needs pyarrow: install vignette with the extra [bulk]") from cause
    return pyarrow.parquet


def _object(line: bytes) -> Mapping[str, Any] | BrokenRow:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRow(f"this line is no JSON: {error}")
    return found if isinstance(found, dict) else BrokenRow("this line is no JSON object")


def _cells(row: Any) -> Mapping[str, Any] | BrokenRow:
    try:
        return row.to_pylist()[0]
    except (ValueError, ArithmeticError) as error:  # no UTF-8, or times that Python does not have
        return BrokenRow(f"this row can't be read: {error}")


def _bounded(stream: Any) -> Iterator[tuple[int, Any]]:
    """Numbered lines, with a BrokenRow in place of an overlong one."""
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        short = piece = line
        while len(piece) == _LONGEST_LINE and ord(piece[-1:]) != ord("\n"):
            short = BrokenRow(f"this line has over {_LONGEST_LINE // 2**20} MiB")
            piece = stream.readline(_LONGEST_LINE)
        yield number, short
