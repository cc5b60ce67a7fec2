"""A folder of .txt files, laid out like the input's images, as diffusion trainers read them."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from msgspec.structs import replace
from typing_extensions import override

from server.bulk.inputs.folders import below
from server.bulk.inputs.items import Outcome, ResultRow
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.keys import key
from server.bulk.outputs.base import NotWritten, Output, OutputConflict
from server.bulk.outputs.files import remove_empty
from server.bulk.outputs.index import Index
from server.bulk.outputs.lines import Lines

HIDDEN_ROWS = ".vignette.jsonl"
_PREFIX = ".vignette."  # of the names of our own files
_PARTIAL = re.compile(r"\.vignette\.[0-9a-f]{32}\.partial")


class Texts(Output):
    """A file for each caption. All rows, errors too, are JSON lines in a hidden file there."""

    def __init__(self, folder: Path, overwrite: bool) -> None:
        """overwrite: also foreign files. Raises OutputConflict if another run has the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._overwrite = folder.resolve(), overwrite
        self._lines = Lines(self._folder / HIDDEN_ROWS)
        self._written = Kept()  # item id and caption by a file's path
        self._before = Kept()  # captions that were replaced, likewise
        self._texts = Kept()  # a file's path by item id
        self._last: str | None = None  # file of the last row, if it was not written

    @override
    def rows(self) -> Iterator[ResultRow]:
        """All rows. Captions that are not in their files, or are but have been replaced by errors,
        because the last run was killed, are written and removed once all rows have been read: a run
        that is refused changes nothing.
        """
        missing, stale, last = False, set[str](), None
        begun = [each for each in self._folder.iterdir() if _PARTIAL.fullmatch(each.name)]
        for row in self._lines.rows():
            if row.text is not None and below(row.text) != row.text:
                raise OutputConflict(
                    f"{self._lines.path} has a row whose text lies outside of the output "
                    f"({row.text}): name another output"
                )
            earlier = self._text_of(row.id)
            if earlier is not None and (row.error is not None or earlier != row.text):
                self._forget(earlier)
                stale.add(earlier)
            if row.text is not None and row.error is None:
                self._texts.keep(row.id, row.text.encode())
                if (before := self._written.get(row.text)) is not None:
                    self._before.keep(row.text, _parts(before)[1])
                self._written.keep(row.text, _mark(row))
                missing |= self._lacks(row.text)
            last = row
            yield row
        if last is not None and self._is_begun(last):
            self._last = last.text
            missing = True
        for text in stale:
            if not self._owner(text):
                self._remove(text)
        if missing:
            self._restore()
        for partial in begun:
            partial.unlink(missing_ok=True)

    @override
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        """Raises NotWritten if the caption's file can't, or must not, be written. An error takes
        the place of an earlier caption, whose file is removed: the image is another now.
        """
        text = f"{PurePosixPath(outcome.item.key or outcome.item.name)}.txt"
        if row.caption is not None:
            self._check(row.id, text)
            self._begin(text, row.caption)  # until it replaces its file's, the row is not done
            row = replace(row, text=text)
        self._lines.append(row, outcome)
        earlier = self._text_of(row.id)
        if earlier is not None and earlier != row.text:
            self._forget(earlier)
            self._remove(earlier)
        if row.caption is not None:
            self._texts.keep(row.id, text.encode())
            self._written.keep(text, _mark(row))
            self._partial(text).replace(self._folder / text)

    @override
    def finish(self, index: Index) -> None:
        self._lines.finish(index)

    @override
    def close(self) -> None:
        remove_empty(self._lines.path)
        self._lines.close()

    def _owner(self, text: str) -> str:
        """Id of the item whose caption is in a file; empty if there is none."""
        return _parts(self._written.get(text))[0]

    def _text_of(self, item_id: str) -> str | None:
        """The file of an item's last caption, if that is still its."""
        text = (self._texts.get(item_id) or b"").decode()
        return text if text and self._owner(text) == item_id else None

    def _forget(self, text: str) -> None:
        """Note that an error has replaced the caption in a file."""
        if written := self._written.get(text):
            self._before.keep(text, _parts(written)[1])
        self._written.keep(text, b"")

    def _remove(self, text: str) -> None:
        """Remove a forgotten caption's file, unless somebody changed it."""
        target = self._folder / text
        inside = target.parent.resolve().is_relative_to(self._folder)
        if inside and target.is_file() and target.read_bytes() == self._before.get(text):
            target.unlink()

    def _restore(self) -> None:
        for row in self._lines.rows():
            if row.text is None or row.caption is None or not self._lacks(row.text):
                continue
            if self._written.get(row.text) == _mark(row):  # the last row of this file
                try:
                    self._check(row.id, row.text)
                except NotWritten as cause:
                    raise OutputConflict(
                        f"{self._lines.path} has a row without its text, and {cause}: name another "
                        "output"
                    ) from cause
                self._begin(row.text, row.caption)
                self._partial(row.text).replace(self._folder / row.text)

    def _lacks(self, text: str) -> bool:
        """Whether the last caption of a file is not there: no file, or one with that before, or, if
        a killed run was about to replace it, one with anything else.
        """
        target, before = self._folder / text, self._before.get(text)
        if not target.exists():
            return True
        _, last = _parts(self._written.get(text))
        if not target.is_file():
            return False
        if text == self._last:
            return target.read_bytes() != last
        return before not in (None, last) and target.read_bytes() == before

    def _check(self, item_id: str, text: str) -> None:
        """Raise NotWritten if an item's file can't, or must not, be written."""
        target = self._folder / text
        try:
            if PurePosixPath(text).parts[0].startswith(_PREFIX):
                raise NotWritten(f"{text} has the name of a file of ours")
            if below(text) != text or not target.resolve().is_relative_to(self._folder):
                raise NotWritten(f"{text} lies outside of the output")
            if target.exists() and not target.is_file():
                raise NotWritten(f"{text} is no regular file")
            target.parent.mkdir(parents=True, exist_ok=True)
            if (owner := self._owner(text)) not in ("", item_id):
                raise NotWritten(f"{text} has the caption of {owner} already")
            _, written = _parts(self._written.get(text))
            ours = written, self._before.get(text)
            if not self._overwrite and target.exists() and target.read_bytes() not in ours:
                raise NotWritten(f"{text} is there, and not written by this (see --overwrite)")
        except (OSError, ValueError) as cause:
            raise NotWritten(f"{text} can't be a file here: {cause}") from cause

    def _partial(self, text: str) -> Path:
        return self._folder / f"{_PREFIX}{key(text).hex()}.partial"

    def _begin(self, text: str, caption: str) -> None:
        """Write a caption to a file that is to replace its own."""
        partial = self._partial(text)
        partial.unlink(missing_ok=True)
        with partial.open("xb") as stream:  # "x" does not follow links
            stream.write(caption.encode())

    def _is_begun(self, row: ResultRow) -> bool:
        """Whether a row's caption was written, but did not replace its file's."""
        if row.text is None or row.caption is None:
            return False
        partial = self._partial(row.text)
        if partial.is_symlink() or not partial.is_file():
            return False
        return partial.read_bytes() == row.caption.encode()


def _mark(row: ResultRow) -> bytes:
    """Id and caption of a row; the id's length comes first, because it may hold any character."""
    owner = row.id.encode()
    return b"%d\0%s%s" % (len(owner), owner, f"{row.caption}".encode())


def _parts(mark: bytes | None) -> tuple[str, bytes]:
    """Id and caption of a mark; both empty if there is none."""
    length, _, rest = (mark or b"0").partition(b"\0")
    return rest[: int(length)].decode(), rest[int(length) :]
