"""Usage of each API key, counted by all front-ends together in a memory-mapped file."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from server.ipc.shared import reserve


class KeyUsage:
    """A record for each key: `tokens` and `filled_at` of its bucket (in seconds of
    `time.monotonic`, which all processes share), and `inside`, the requests in each front-end.
    """

    def __init__(self, path: Path, keys: int, front_ends: int, index: int) -> None:
        """Open the file at `path`, creating it if needed, for front-end `index`.

        Requests that an earlier process of that front-end had inside are forgotten.
        """
        record = np.dtype(
            [("tokens", float), ("filled_at", float), ("inside", np.int64, (front_ends,))]
        )
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        reserve(self._file, keys * record.itemsize, "API keys' use", "free some of it")
        self._records = np.memmap(path, record, "r+", shape=(keys,))
        self._index = index
        with self.held():
            self._records["inside"][:, index] = 0

    def remove(self) -> None:
        """Unlink the file; it lasts as long as a process has it open."""
        self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        os.close(self._file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the file against other processes. The system unlocks it if this one dies."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def inside(self, key: int) -> int:
        """Requests with this key in all front-ends."""
        return int(self._records["inside"][key].sum())

    def count(self, key: int, change: int) -> None:
        """Add `change` to this front-end's requests with a key."""
        self._records["inside"][key, self._index] += change

    def refill(self, key: int, rate: float, most: float, now: float) -> float:
        """Refill a key's bucket, `rate` tokens a second up to `most`, full at first; its tokens."""
        record = self._records[key]
        gained = (now - record["filled_at"]) * rate if record["filled_at"] else most
        record["tokens"], record["filled_at"] = min(most, record["tokens"] + gained), now
        return float(record["tokens"])

    def spend(self, key: int, tokens: int) -> None:
        """Take tokens from a key's bucket."""
        self._records["tokens"][key] -= tokens
