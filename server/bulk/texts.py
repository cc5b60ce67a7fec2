"""A folder of .txt files, each where its image lies in the input: what diffusion trainers read."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from msgspec.structs import replace
from typing_extensions import override

from server.bulk.index import Index, Kept
from server.bulk.items import Outcome, ResultRow
from server.bulk.output import Lines, NotWritten, Output

_ROWS, _PARTIAL = ".vignette.jsonl", ".vignette.partial"


class Texts(Output):
    """A file for each caption. All rows, errors too, are lines of JSON in a hidden file there."""

    def __init__(self, folder: Path, overwrite: bool) -> None:
        """overwrite: also what this did not write. Raises OutputConflict if another run has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._overwrite = folder.resolve(), overwrite
        self._lines = Lines(self._folder / _ROWS)
        self._written = Kept()  # whose text a file has, and which, by its path

    @override
    def rows(self) -> Iterator[ResultRow]:
        """What was said and has no file, because the last run was killed, gets it."""
        for row in self._lines.rows():
            if row.text is not None and row.caption is not None:
                self._written.keep(row.text, _mark(row))
                if not (self._folder / row.text).exists():
                    self._write(row.text, row.caption)
            yield row

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        """Raises NotWritten where there is a file that this did not write."""
        if row.caption is None:
            self._lines.append(row, outcome)
            return
        name = outcome.item.key or outcome.item.name
        row = replace(row, text=f"{PurePosixPath(name)}.txt")
        assert row.text is not None and row.caption is not None
        try:
            self._check(row.id, row.text)
        except (OSError, ValueError) as cause:
            raise NotWritten(f"{row.text} can't be a file here: {cause}") from cause
        self._lines.append(row, outcome)
        self._written.keep(row.text, _mark(row))
        self._write(row.text, row.caption)

    @override
    def finish(self, index: Index) -> None:
        self._lines.finish(index)

    @override
    def close(self) -> None:
        self._lines.close()

    def _check(self, item_id: str, text: str) -> None:
        target = self._folder / text
        if not target.resolve().is_relative_to(self._folder):
            raise NotWritten(f"{text} lies outside of the output")
        if target.is_dir():
            raise NotWritten(f"{text} is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        owner, _, written = (self._written.get(text) or b"").partition(b"\0")
        if owner and owner != item_id.encode():
            raise NotWritten(f"{text} has the caption of {owner.decode()} already")
        if not self._overwrite and target.exists() and target.read_bytes() != written:
            raise NotWritten(f"{text} is there, and not written by this (see --overwrite)")

    def _write(self, text: str, caption: str) -> None:
        target, partial = self._folder / text, self._folder / _PARTIAL
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(caption.encode())
        partial.replace(target)


def _mark(row: ResultRow) -> bytes:
    return f"{row.id}\0{row.caption}".encode()
