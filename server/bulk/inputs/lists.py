"""Lists and tables with a column of paths, URLs or image bytes, read as they stream."""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

from runtime.errors import VignetteError
from server.bulk.inputs.fetching import as_path, is_relative, is_url, opened
from server.bulk.inputs.folders import named, plain
from server.bulk.inputs.items import Item
from server.bulk.inputs.rows import (
    IMAGE,
    BrokenRow,
    Rows,
    Table,
    csv_rows,
    json_rows,
    lines,
    parquet,
    parquet_rows,
    table_of,
)

_LONGEST_CELL = 2**16  # characters of a path, prompt or id


class NoColumn(VignetteError):
    """A table lacks a requested column."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a table's columns; for a shard, extensions of a sample's members."""

    image: str | None = None
    prompt: str | None = None
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ListFile:
    """A list: .txt (a path or URL a line), .csv, .jsonl or .parquet; "-" is standard input as .txt.

    Paths are relative to the list's folder. part: the only row group to read of a Parquet file;
    table: what that was like when it was taken apart.
    with_folder: names begin with that folder, as other lists may name images that are called alike.
    """

    path: str
    columns: Columns
    part: int | None = None
    table: Table | None = None
    with_folder: bool = False

    suffixes: ClassVar = (".txt", ".csv", ".jsonl", ".parquet")

    def items(self, readable: Callable[[str], object] = lambda item_id: None) -> Iterator[Item]:
        """An item for each row; one for a broken row has the error. Raises NoColumn.

        readable: called with the id under which a row's error would be, if the row has another id.
        """
        for number, row in self._rows():
            where = f"{plain(self.path)}#{number}"
            item = self._item(where, number, row)
            if item.id != where:
                readable(where)
            yield item

    def count(self, over: Event) -> int | None:
        """The number of rows; None for a pipe or a URL, which are read only once."""
        if self.path == "-" or is_url(self.path) or not Path(self.path).is_file():
            return None
        if self._is(".parquet"):
            with opened(self.path) as stream:
                return int(parquet().ParquetFile(stream).metadata.num_rows)
        return sum(1 for _ in self._rows() if not over.is_set())

    def parts(self) -> "list[ListFile]":
        """The list in pieces that can be read in parallel: row groups of Parquet."""
        if not self._is(".parquet"):
            return [self]
        with opened(self.path) as stream:
            table = table_of(parquet().ParquetFile(stream))
        return [replace(self, part=group, table=table) for group in range(table.groups)]

    def _rows(self) -> Rows:
        """Numbered rows by column; a BrokenRow for one that can't be read."""
        if self.path == "-":
            # Without input for a moment, a non-blocking read looks like the end. And not
            # sys.stdin.buffer: a thread that waits in it as the program ends aborts that.
            os.set_blocking(sys.stdin.fileno(), True)
            yield from lines(open(sys.stdin.fileno(), "rb", closefd=False))  # noqa: SIM115
            return
        with opened(self.path) as stream:
            # Files of fsspec have no `readline` with a limit.
            has = isinstance(stream, io.BufferedReader)
            buffered: Any = stream if has else io.BufferedReader(stream)
            if self._is(".parquet"):
                wanted = [n for n in (self._image, self.columns.prompt, self.columns.id) if n]
                yield from parquet_rows(stream, self._check, wanted, self.part, self.table)
            elif self._is(".csv"):
                yield from csv_rows(buffered, self._check)
            elif self._is(".jsonl"):
                yield from json_rows(buffered)
            else:
                yield from lines(buffered)

    def _is(self, suffix: str) -> bool:
        return self.path.lower().endswith(suffix)

    @property
    def folder(self) -> str:
        """What its paths are relative to."""
        return self.path.rpartition("/")[0]

    @property
    def _image(self) -> str:
        return self.columns.image or IMAGE

    def _check(self, there: Iterable[str]) -> None:
        there = list(there)
        if not there:
            raise NoColumn(f"{self.path} is empty, or its first line is, which names its columns")
        for flag, name in (
            ("--column", self._image),
            ("--prompt-column", self.columns.prompt),
            ("--id-column", self.columns.id),
        ):
            if name and name not in there:
                raise NoColumn(
                    f"{self.path} has no column {name}: name one of {', '.join(there)} with {flag}"
                )

    def _item(self, where: str, number: int, row: Mapping[str, Any] | BrokenRow) -> Item:
        try:
            return self._named(where, number, row)
        except (BrokenRow, ValueError) as error:  # ValueError: a malformed URL
            return Item(where, wrong=str(error))

    def _named(self, where: str, number: int, row: Mapping[str, Any] | BrokenRow) -> Item:
        if isinstance(row, BrokenRow):
            raise row
        image, prompt, known = (
            row.get(name) if name else None
            for name in (self._image, self.columns.prompt, self.columns.id)
        )
        if isinstance(image, Mapping):  # as the `datasets` library stores images
            image = image.get("bytes") or image.get("path")
        if not isinstance(image, bytes | str) or not image:
            raise BrokenRow(f"there is no path, URL or image in {self._image}")
        if prompt is not None and not isinstance(prompt, str):
            raise BrokenRow(f"{self.columns.prompt} is no text")
        if self.columns.id and known in (None, ""):
            raise BrokenRow(f"there is nothing in {self.columns.id}")
        path = None if isinstance(image, bytes) or image.startswith("data:") else image
        location = path and self._location(path)
        where = plain(location) if location else where
        for cell in (where, prompt or "", str(known)):
            if len(cell) > _LONGEST_CELL:
                raise BrokenRow(f"a path, prompt or id has {len(cell)} characters: that is none")
        return Item(
            id=where if known is None else str(known),
            image=location or image,
            name=named(str(location if self.with_folder else path))
            if path
            else f"{named(self.path)}/{number}",
            prompt=prompt or None,
        )

    def _location(self, image: str) -> str:
        """The path or URL of an image that the list names."""
        if self.path == "-" or not is_relative(image):
            return image
        if is_url(self.path):
            return f"{self.folder}/{image}"
        return str(Path(self.path).parent / as_path(image))
