"""Tables of rows. Appending to CSV or Parquet is not crash-safe: rows go to JSON lines first, and
the table is written in one piece when a run ends.
"""

import csv
import io
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from typing_extensions import override

from server.bulk.inputs.items import Outcome, ResultRow
from server.bulk.inputs.rows import parquet
from server.bulk.outputs.base import Output, OutputConflict, latest
from server.bulk.outputs.files import check_regular, remove_empty, replacing
from server.bulk.outputs.index import Index
from server.bulk.outputs.lines import Lines

ROWS = ".rows.jsonl"  # appended to the table's name
_COLUMNS = ResultRow.__struct_fields__
_KINDS: dict[str, Callable[[str], Any]] = {  # of CSV columns that are not text
    "captions": json.loads, "settings": json.loads, "score": float, "size": int, "modified": int,
}  # fmt: skip
_GROUP = 10_000  # rows of a Parquet row group


class TableOutput(Output):
    """A table that is written when a run has ended."""

    def __init__(self, path: Path) -> None:
        """Raises OutputConflict if another run writes to it, or it is no regular file."""
        check_regular(path)
        self.path = path
        self._lines = Lines(path.with_name(path.name + ROWS))
        self._new = False

    @override
    def rows(self) -> Iterator[ResultRow]:
        """Rows of the table, then those added since. Raises OutputConflict for a foreign table."""
        return chain(self._table(), self._since())

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        self._new = True
        self._lines.append(row, outcome)

    @override
    def finish(self, index: Index) -> None:
        if self._new or index.replaced or not self.path.exists():
            rows = latest(chain(self._table(), self._lines.rows()), index)
            with replacing(self.path) as stream:
                self.write(stream, rows)
        self._lines.clear()

    @override
    def close(self) -> None:
        remove_empty(self._lines.path)
        self._lines.close()

    def _since(self) -> Iterator[ResultRow]:
        for row in self._lines.rows():
            self._new = True
            yield row

    def _table(self) -> Iterator[ResultRow]:
        if not self.path.exists():
            return
        try:
            yield from (msgspec.convert(each, ResultRow) for each in self.read())
        except (
            ValueError, TypeError, NotImplementedError, csv.Error, msgspec.MsgspecError,
        ) as cause:  # fmt: skip
            raise OutputConflict(
                f"{self.path} is no table of ours ({cause}): name another output"
            ) from cause

    @abstractmethod
    def read(self) -> Iterable[dict[str, Any]]:
        """The fields of each row in the file. Raises ValueError for a foreign table."""

    @abstractmethod
    def write(self, stream: BinaryIO, rows: Iterator[ResultRow]) -> None:
        """Write the whole file."""


class Csv(TableOutput):
    """Comma-separated values with a header; `captions` and `settings` are JSON."""

    @override
    def read(self) -> Iterable[dict[str, Any]]:
        with self.path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            if tuple(reader.fieldnames or ()) != _COLUMNS:
                raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
            for row in reader:
                found: dict[str, Any] = {name: value for name, value in row.items() if value != ""}
                for name, kind in _KINDS.items():
                    if name in found:
                        found[name] = kind(found[name])
                if "error" not in found:
                    found.setdefault("caption", "")
                yield found

    @override
    def write(self, stream: BinaryIO, rows: Iterator[ResultRow]) -> None:
        text = io.TextIOWrapper(stream, "utf-8", newline="")
        writer = csv.writer(text)
        writer.writerow(_COLUMNS)
        for row in rows:
            known = msgspec.to_builtins(row)
            for name in ("captions", "settings"):
                if name in known:
                    known[name] = json.dumps(known[name], ensure_ascii=False)
            writer.writerow([known.get(name) for name in _COLUMNS])
        text.flush()
        text.detach()


class Parquet(TableOutput):
    """Parquet in row groups of 10,000; `settings` is JSON."""

    def __init__(self, path: Path) -> None:
        """Raises NoWay without pyarrow: at once, not when the table is written in the end."""
        parquet()
        super().__init__(path)

    @override
    def read(self) -> Iterable[dict[str, Any]]:
        file = parquet().ParquetFile(self.path)
        if file.schema_arrow != _schema():
            raise ValueError(f"its columns are not {', '.join(_COLUMNS)}")
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                found = {name: value for name, value in row.items() if value is not None}
                yield found | {"settings": json.loads(found.get("settings", "{}"))}

    @override
    def write(self, stream: BinaryIO, rows: Iterator[ResultRow]) -> None:
        import pyarrow as pa

        schema = _schema()
        with parquet().ParquetWriter(stream, schema) as writer:
            while group := list(islice(rows, _GROUP)):
                found = [msgspec.to_builtins(row) for row in group]
                for row in found:
                    if "settings" in row:
                        row["settings"] = json.dumps(row["settings"])
                writer.write_table(pa.Table.from_pylist(found, schema))


def _schema() -> Any:
    parquet()
    import pyarrow as pa

    text = pa.string()
    said = [("caption", text), ("finish_reason", text), ("score", pa.float64())]
    kinds: dict[str, Any] = {
        "score": pa.float64(),
        "captions": pa.list_(pa.struct(said)),
        "size": pa.int64(),
        "modified": pa.int64(),
    }
    return pa.schema({name: kinds.get(name, text) for name in _COLUMNS})
