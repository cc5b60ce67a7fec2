"""Index of the items that have a row: on disk beyond some megabytes, for any number of items."""

import hashlib
import sqlite3
import threading
from dataclasses import dataclass

import numpy as np

from server.bulk.items import ResultRow

_KEY_BYTES = 16
_CACHE_KIB = 64 * 1024  # of memory


class Index:
    """Row numbers by item id. Used by one thread.

    An item's last row counts. replaced: whether any row replaced an earlier one.
    """

    def __init__(self) -> None:
        """Start empty: the index is rebuilt from the rows at every start."""
        self._table = _table(
            "(id BLOB PRIMARY KEY, row INTEGER, done INTEGER, failed INTEGER) WITHOUT ROWID"
        )
        self._next = 0
        self.replaced = False

    def add(self, row: ResultRow, done: bool) -> None:
        """Add the output's next row. done: its item is not to be captioned again."""
        key = _key(row.id)
        known = self._table.execute("SELECT row FROM t WHERE id = ?", (key,)).fetchone()
        self.replaced |= known is not None and known[0] is not None
        values = key, self._next, done, row.error is not None
        self._table.execute("INSERT OR REPLACE INTO t VALUES (?, ?, ?, ?)", values)
        self._next += 1

    def claim(self, item_id: str) -> bool:
        """Whether an item is still to be captioned; marks it as done."""
        found = self._table.execute(
            "INSERT INTO t VALUES (?, NULL, 1, 0) ON CONFLICT(id) DO UPDATE SET done = 1 "
            "WHERE done = 0",
            (_key(item_id),),
        )
        return found.rowcount > 0

    def drop_error(self, item_id: str) -> None:
        """Drop an item's row if that is an error: what was wrong is right now."""
        found = self._table.execute(
            "UPDATE t SET row = NULL, failed = 0 WHERE id = ? AND failed", (_key(item_id),)
        )
        self.replaced |= found.rowcount > 0

    @property
    def failed(self) -> int:
        """The number of items whose last row is an error."""
        [[count]] = self._table.execute("SELECT count(*) FROM t WHERE failed")
        return int(count)

    def keys(self) -> "FinishedItems":
        """The items that are not to be captioned again, for other processes."""
        found = self._table.execute("SELECT id FROM t WHERE done ORDER BY id")
        return FinishedItems(np.array([key for [key] in found], f"S{_KEY_BYTES}"))

    def latest(self, row: ResultRow, number: int) -> bool:
        """Whether the output's row with this number is its item's last."""
        [[last]] = self._table.execute("SELECT row FROM t WHERE id = ?", (_key(row.id),))
        return last == number


@dataclass(frozen=True, slots=True)
class FinishedItems:
    """Items that are done, 16 bytes each. sorted: S16 [items]."""

    sorted: np.ndarray

    def __contains__(self, item_id: str) -> bool:
        key = np.bytes_(_key(item_id))
        place = int(np.searchsorted(self.sorted, key))
        return key in self.sorted[place : place + 1]  # as arrays: both drop zero bytes at the end


class Kept:
    """Bytes by text key, the last for each. Used by any thread."""

    def __init__(self) -> None:
        self._table = _table("(key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """The bytes kept for a key, or None."""
        with self._lock:
            found = self._table.execute("SELECT value FROM t WHERE key = ?", (_key(key),))
            row = found.fetchone()
        return row and row[0]

    def keep(self, key: str, value: bytes) -> None:
        """Keep bytes for a key, in place of earlier ones."""
        with self._lock:
            self._table.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (_key(key), value))


def _table(columns: str) -> sqlite3.Connection:
    """A table `t` in an unnamed database: SQLite keeps it in memory, and beyond its cache in a
    temporary file that it deletes.
    """
    made = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    made.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    made.execute("PRAGMA journal_mode = OFF")
    made.execute(f"CREATE TABLE t {columns}")
    made.execute("BEGIN")
    return made


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_KEY_BYTES).digest()
