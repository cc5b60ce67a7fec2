"""Lists and tables with a column of paths, URLs or image bytes, read as they stream."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

from runtime.errors import VignetteError
from server.bulk.fetching import NoWay, is_url, opened
from server.bulk.folders import named
from server.bulk.items import Item

_ROWS = 8  # of a Parquet file that are held at a time: they may be large images
_COLUMN = "image"  # unless another is named
_LONGEST_LINE = 64 * 2**20  # a data URI of an image fits
csv.field_size_limit(_LONGEST_LINE)


class NoColumn(VignetteError):
    """A table lacks a column that was named."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a table are what. In a shard they are extensions of a sample's members."""

    image: str | None = None
    prompt: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ListFile:
    """A list: .txt (a path or URL a line), .csv, .jsonl or .parquet; "-" is standard input as .txt.

    Paths are relative to the folder that the list is in. part: of a Parquet file a row group alone.
    """

    path: str
    columns: Columns
    part: int | None = None

    suffixes: ClassVar = (".txt", ".csv", ".jsonl", ".parquet")

    def items(self) -> Iterator[Item]:
        """Its rows. Raises NoColumn; what is wrong with one row is said of that one."""
        for number, row in self._rows():
            yield self._item(number, row)

    def count(self, over: Event) -> int | None:
        """How many rows it has, or None: standard input is read once, and so is what is far."""
        if self.path == "-" or is_url(self.path):
            return None
        if self.path.endswith(".parquet"):
            with opened(self.path) as stream:
                return int(parquet().ParquetFile(stream).metadata.num_rows)
        return sum(1 for _ in self._rows() if not over.is_set())

    def parts(self) -> "list[ListFile]":
        """Itself in pieces that can be read side by side."""
        if not self.path.endswith(".parquet"):
            return [self]
        with opened(self.path) as stream:
            count = parquet().ParquetFile(stream).num_row_groups
        return [ListFile(self.path, self.columns, group) for group in range(count)]

    def _rows(self) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
        """Numbers, and rows by column; of a line that is none, what is wrong with it."""
        if self.path == "-":
            yield from _lines(sys.stdin.buffer)
            return
        with opened(self.path) as stream:
            if self.path.endswith(".parquet"):
                yield from self._parquet_rows(stream)
            elif self.path.endswith(".csv"):
                text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
                reader = csv.DictReader(text)
                self._check(reader.fieldnames or ())
                yield from enumerate(reader, 1)
            elif self.path.endswith(".jsonl"):
                yield from _objects(stream)
            else:
                yield from _lines(stream)

    def _parquet_rows(self, stream: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
        file = parquet().ParquetFile(stream)
        self._check(file.schema_arrow.names)
        wanted = [name for name in (self._image, self.columns.prompt, self.columns.id) if name]
        groups = range(file.num_row_groups) if self.part is None else [self.part]
        number = sum(file.metadata.row_group(g).num_rows for g in range(self.part or 0))
        for batch in file.iter_batches(_ROWS, groups, wanted):
            for row in batch.to_pylist():
                number += 1
                yield number, row

    @property
    def _image(self) -> str:
        return self.columns.image or _COLUMN

    def _check(self, there: Iterable[str]) -> None:
        there = list(there)
        for flag, name in (
            ("--column", self._image),
            ("--prompt-column", self.columns.prompt),
            ("--id-column", self.columns.id),
        ):
            if name and name not in there:
                raise NoColumn(
                    f"{self.path} has no column {name}: name one of {', '.join(there)} with {flag}"
                )

    def _item(self, number: int, row: Mapping[str, Any] | str) -> Item:
        where = f"{self.path}#{number}"
        if isinstance(row, str):
            return Item(where, wrong=row)
        image, prompt, known = (
            row.get(name) if name else None
            for name in (self._image, self.columns.prompt, self.columns.id)
        )
        if isinstance(image, Mapping):  # as the `datasets` library stores images
            image = image.get("bytes") or image.get("path")
        wrong = None
        if not isinstance(image, bytes | str) or not image:
            wrong = f"there is no path, URL or image in {self._image}"
        elif prompt is not None and not isinstance(prompt, str):
            wrong = f"{self.columns.prompt} is no text"
        elif self.columns.id and known in (None, ""):
            wrong = f"there is nothing in {self.columns.id}"
        if wrong is not None:
            return Item(where, wrong=wrong)
        if isinstance(image, bytes):
            return Item(str(known or where), image, f"{named(self.path)}/{number}", prompt or None)
        assert isinstance(image, str)
        location = self._location(image)
        data = image.startswith("data:")
        return Item(
            id=str(known or (where if data else image)),
            image=location,
            name=f"{named(self.path)}/{number}" if data else named(image),
            prompt=prompt or None,
        )

    def _location(self, image: str) -> str:
        """Where an image lies that a list names."""
        if is_url(image) or self.path == "-" or Path(image).is_absolute():
            return image
        if is_url(self.path):
            return self.path.rpartition("/")[0] + "/" + image
        return str(Path(self.path).parent / image)


def _lines(stream: Any) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in _bounded(stream):
        if name := line.rstrip(b"\r\n"):
            yield number, {_COLUMN: name.decode("utf-8", "surrogateescape")}


def _objects(stream: Any) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    for number, line in _bounded(stream):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"this line is no JSON: {error}"
        yield number, found if isinstance(found, dict | str) else "this line is no JSON object"


def _bounded(stream: Any) -> Iterator[tuple[int, bytes]]:
    """Numbered lines. Raises NoWay for one that no list has."""
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise NoWay(f"line {number} of the list has over {_LONGEST_LINE // 2**20} MiB")
        yield number, line


def parquet() -> Any:
    """The module of pyarrow. Raises NoWay without it."""
    try:
        import pyarrow.parquet
    except ImportError as cause:
        raise NoWay("Parquet needs pyarrow: install vignette with the extra [bulk]") from cause
    return pyarrow.parquet
