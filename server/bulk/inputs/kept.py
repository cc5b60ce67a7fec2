"""Bytes by text key: in memory, and beyond some megabytes on disk, for any number of keys."""

import sqlite3
import threading

from server.bulk.inputs.keys import key

_CACHE_KIB = 64 * 1024  # of memory


class Kept:
    """Bytes by text key, the last for each. Used by any thread."""

    def __init__(self) -> None:
        self._table = table("(key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
        self._lock = threading.Lock()

    def get(self, name: str) -> bytes | None:
        """The bytes kept for a key, or None."""
        with self._lock:
            found = self._table.execute("SELECT value FROM t WHERE key = ?", (key(name),))
            row = found.fetchone()
        return row and row[0]

    def keep(self, name: str, value: bytes) -> None:
        """Keep bytes for a key, in place of earlier ones."""
        with self._lock:
            self._table.execute("INSERT OR REPLACE INTO t VALUES (?, ?)", (key(name), value))


def table(columns: str) -> sqlite3.Connection:
    """A table `t` in an unnamed database: SQLite keeps it in memory, and beyond its cache in a
    temporary file that it deletes.
    """
    made = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    made.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    made.execute("PRAGMA journal_mode = OFF")
    made.execute(f"CREATE TABLE t {columns}")
    made.execute("BEGIN")
    return made
