"""Clients of all front-ends that want slots now, or did a moment ago, and how many slots each has,
in a file that all front-ends map.
"""

import os
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from math import inf
from pathlib import Path
from time import monotonic

import numpy as np

from server.ipc.shared import reserve

_LINGER_SECONDS = 2.0
_MOST = 64  # most clients published by each front-end
_RECORD = np.dtype([("client", np.uint64), ("until", float), ("slots", np.int64)])


class PresentClients:
    """The clients of one front-end, published to all. Each counts for `linger` after it left.

    Used on the event loop's thread only. Other front-ends may read a record while it is written: a
    count is then off by one, once.
    """

    def __init__(
        self,
        linger: float = _LINGER_SECONDS,
        clock: Callable[[], float] = monotonic,
        records: np.ndarray | None = None,
        index: int = 0,
    ) -> None:
        """linger: seconds for which a client counts after it left. records: `[front-ends, 64]`, one
        kind of those that `shared` opens. index: of this front-end in them.
        """
        self.linger, self._clock = linger, clock
        self._records = np.zeros((1, _MOST), _RECORD) if records is None else records
        self._mine = self._records[index]
        self._others = np.delete(np.arange(len(self._records)), index)
        self._mine.fill(0)  # drops the records of an earlier epoch
        self._names: list[str] = []  # by place in the record
        self._places: dict[str, int] = {}
        self._hashes: dict[int, str] = {}

    def came(self, client: str) -> None:
        """Note that a client wants slots."""
        place = self._places.get(client)
        if place is None:
            if len(self._names) < _MOST:
                place = len(self._names)
                self._names.append(client)
            else:  # replace the client that left first
                place = int(self._mine["until"].argmin())
                if self._mine["until"][place] == inf:
                    return  # all published clients are present
                del self._places[self._names[place]]
                del self._hashes[int(self._mine["client"][place])]
                self._names[place] = client
            self._places[client], number = place, _hashed(client)
            self._hashes[number], self._mine["client"][place] = client, number
        self._mine["until"][place] = inf

    def has(self, client: str, slots: int) -> None:
        """Note how many slots a client holds in this front-end."""
        if (place := self._places.get(client)) is not None:
            self._mine["slots"][place] = slots

    def left(self, client: str) -> None:
        """Note that a client neither has nor waits for slots."""
        if (place := self._places.get(client)) is not None:
            self._mine["until"][place] = self._clock() + self.linger

    def elsewhere(self) -> Counter[str]:
        """Slots that clients of this front-end hold in other front-ends."""
        found = Counter[str]()
        if len(self._others):
            others = self._records[self._others]
            for record in others[others["slots"] > 0]:
                if (client := self._hashes.get(int(record["client"]))) is not None:
                    found[client] += int(record["slots"])
        return found

    @property
    def front_ends(self) -> int:
        """Number of front-ends that share the file."""
        return len(self._records)

    @property
    def active(self) -> int:
        """Number of front-ends that have clients, this one counted in any case."""
        until: np.ndarray = self._records["until"][self._others]
        return 1 + int(np.any(until > self._clock(), axis=1).sum())

    def count(self) -> int:
        """Number of clients, in all front-ends."""
        counted = self._records["client"][self._records["until"] > self._clock()]
        return len(np.unique(counted))


def shared(path: Path, front_ends: int, kinds: int) -> np.ndarray:
    """Records `[kinds, front-ends, 64]` in a file, which the first caller creates.

    Raises NoSharedMemory.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        shape = kinds, front_ends, _MOST
        size = _RECORD.itemsize * kinds * front_ends * _MOST
        reserve(file, size, "the clients of all front-ends", "free some of it")
        return np.memmap(path, _RECORD, "r+", shape=shape)
    finally:
        os.close(file)


def _hashed(client: str) -> int:
    return int.from_bytes(blake2b(client.encode(), digest_size=8).digest(), "little")
