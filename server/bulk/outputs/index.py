"""Index of the items that have a row: on disk beyond some megabytes, for any number of items."""

import threading
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from runtime.errors import VignetteError
from server.bulk.inputs.items import Item, ResultRow
from server.bulk.inputs.kept import table
from server.bulk.inputs.keys import KEY_BYTES, key, of_item, of_row


class _Error(IntEnum):
    """What an item's last row is an error of."""

    NONE = 0
    IMAGE = 1  # elsewhere
    NO_IMAGE = 2  # or one that is called so


class SameId(VignetteError):
    """Two inputs have one id, or an earlier run had another input of this id."""


class Index:
    """Row numbers by item id. Used by any thread.

    An item's last row counts. replaced: whether any row replaced an earlier one.
    """

    def __init__(self) -> None:
        """Start empty: the index is rebuilt from the rows at every start."""
        self._table = table(
            "(id BLOB PRIMARY KEY, row INTEGER, done INTEGER, failed INTEGER, asked BLOB, "
            "claimed INTEGER) WITHOUT ROWID"
        )
        self._lock = threading.Lock()
        self._next = 0
        self._without_image = False  # whether any row is an error of no image
        self.replaced = False

    def add(self, row: ResultRow, done: bool) -> None:
        """Add the output's next row. done: its item is not to be captioned again."""
        asked, failed = of_row(row), _Error.NONE
        if row.error is not None:
            failed = _Error.NO_IMAGE if row.path is None else _Error.IMAGE
        with self._lock:
            self._without_image |= failed == _Error.NO_IMAGE
            found = self._table.execute("SELECT row, claimed FROM t WHERE id = ?", (key(row.id),))
            before, claimed = found.fetchone() or (None, False)
            self.replaced |= before is not None
            values = key(row.id), self._next, done, failed, asked, claimed
            self._table.execute("INSERT OR REPLACE INTO t VALUES (?, ?, ?, ?, ?, ?)", values)
            self._next += 1

    def claim(self, item_id: str, asked: bytes, again: bool = False) -> bool:
        """Whether an item is still to be captioned; marks it as done.

        asked: see `of_item`. again: also if another image or prompt had its id in an earlier run,
        or if it has no image now.
        Raises SameId if that is not wished, or if one of this run has it.
        """
        with self._lock:
            return self._claim(item_id, asked, again)

    def _claim(self, item_id: str, asked: bytes, again: bool) -> bool:
        found = self._table.execute(
            "SELECT done, failed, asked, claimed FROM t WHERE id = ?", (key(item_id),)
        ).fetchone()
        if found is None:
            values = key(item_id), None, True, _Error.NONE, asked, True
            self._table.execute("INSERT INTO t VALUES (?, ?, ?, ?, ?, ?)", values)
            return True
        done, failed, known, claimed = found
        if done:
            if asked in _split(known):
                self._mark(item_id, known)
                return False
            # Of an image that lies elsewhere, what is wrong may be right later.
            if not asked and (failed or len(known) <= KEY_BYTES):
                return False
            if claimed and not known:  # as an item without an image, whose error is not written yet
                return False
            if claimed:
                raise SameId(
                    f"two inputs are called {item_id}, with other images or prompts: give each an "
                    "id (--id-column), or caption them into two outputs"
                )
            if failed:  # an error is no caption of another image
                self._mark(item_id, asked)
                return False
            if not again:
                now = "a row of another image or prompt" if asked else "a caption, but no image now"
                raise SameId(
                    f"{item_id} has {now}: name another output, give ids (--id-column), or caption "
                    "such images anew with --again"
                )
        self._mark(item_id, asked)
        return True

    def _mark(self, item_id: str, asked: bytes) -> None:
        """Mark an item as done, and met in this run as this image."""
        mark = "UPDATE t SET done = 1, asked = ?, claimed = 1 WHERE id = ?"
        self._table.execute(mark, (asked, key(item_id)))

    def drop_error(self, item_id: str) -> None:
        """Drop the row of an item without an image if it is an error: what was wrong is right.

        An image that is called so, and was met in this run, keeps its row; one that is met later is
        captioned anew.
        """
        if not self._without_image:
            return
        with self._lock:
            found = self._table.execute(
                "UPDATE t SET row = NULL, done = 0, failed = 0 "
                "WHERE id = ? AND failed = ? AND NOT claimed",
                (key(item_id), _Error.NO_IMAGE),
            )
            self.replaced |= found.rowcount > 0

    @property
    def failed(self) -> int:
        """The number of items whose last row is an error."""
        [[count]] = self._table.execute("SELECT count(*) FROM t WHERE failed")
        return int(count)

    @property
    def done(self) -> int:
        """The number of items that are not to be captioned again."""
        [[count]] = self._table.execute("SELECT count(*) FROM t WHERE done")
        return int(count)

    def keys(self) -> "FinishedItems":
        """The items that are not to be captioned again, for other processes."""
        rows = self._table.execute("SELECT id, failed, asked FROM t WHERE done")
        keys = (key for item, *about in rows for key in _finished(item, *about))
        return FinishedItems(np.unique(np.fromiter(keys, f"S{KEY_BYTES}")))

    @property
    def rows(self) -> int:
        """The number of rows that were added."""
        return self._next

    def latest(self, row: ResultRow, number: int) -> bool:
        """Whether the output's row with this number is its item's last."""
        [[last]] = self._table.execute("SELECT row FROM t WHERE id = ?", (key(row.id),))
        return last == number


@dataclass(frozen=True, slots=True)
class FinishedItems:
    """Items that are done, by their keys; those that failed by their ids. sorted: S16 [keys]."""

    sorted: np.ndarray

    def __contains__(self, item: Item) -> bool:
        return self._has(of_item(item)) or self._has(key(item.id))

    def _has(self, key: bytes) -> bool:
        found = np.bytes_(key)
        place = int(np.searchsorted(self.sorted, found))
        return found in self.sorted[place : place + 1]  # as arrays: both drop zero bytes at the end


def _split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _finished(item: bytes, failed: bool, asked: bytes) -> list[bytes]:
    """Keys of a row for other processes: an error is of whatever has its id."""
    return [item] if failed else _split(asked)
