"""What each API key has used, counted by all front-ends together in a file that they map."""

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
        """The file at `path`, made by whoever comes first, for front-end `index`.

        What an earlier life of that front-end had inside is forgotten.
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
        """Nobody else opens it; it lasts as long as somebody counts there."""
        self._path.unlink(missing_ok=True)

    def __del__(self) -> None:
        os.close(self._file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else counts meanwhile. The system lets go for a process that dies."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def inside(self, key: int) -> int:
        """Requests with this key in all front-ends."""
        return int(self._records["inside"][key].sum())

    def count(self, key: int, change: int) -> None:
        """That many requests more in this front-end."""
        self._records["inside"][key, self._index] += change

    def refill(self, key: int, rate: float, most: float, now: float) -> float:
        """Tokens in a key's bucket, which gains `rate` a second up to `most` and begins full."""
        record = self._records[key]
        gained = (now - record["filled_at"]) * rate if record["filled_at"] else most
        record["tokens"], record["filled_at"] = min(most, record["tokens"] + gained), now
        return float(record["tokens"])

    def spend(self, key: int) -> None:
        """One token less."""
        self._records["tokens"][key] -= 1
