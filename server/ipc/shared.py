"""Shared memory of a run: its folder, and the pixels of requests.

A worker also marks in the pixel files which requests it is about to encode: shared memory survives
a crash; a queued message would not.
"""

import fcntl
import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from runtime.errors import VignetteError
from server.system import allocate

_PREFIX, _LOCK = "vignette-run-", "lock"
_FRESH_SECONDS = 60.0  # a younger folder without a lock is still being created


class NoSharedMemory(VignetteError):
    """Shared memory has no room for what a run needs."""


def reserve(handle: int, size: int, what: str, remedy: str) -> None:
    """Allocate a file's space. Raises NoSharedMemory, which names its content and the remedy."""
    try:
        allocate(handle, size)
    except OSError as cause:
        raise NoSharedMemory(
            f"shared memory has no room for {size / 2**20:.1f} MiB of {what} ({cause.strerror}): "
            f"{remedy}"
        ) from cause


class PixelStore:
    """A file in shared memory with room for the pixels of `slots` requests.

    The image decoder writes pixels into a slot, the worker reads them there, and the front-end that
    owns the file reuses the slot once the request was answered.

    started: for each slot, the id of the request that a worker has started there, or 0. size: of
    the file in bytes.
    """

    def __init__(
        self, path: Path, slots: int, shape: tuple[int, ...], create: bool = False
    ) -> None:
        """Create the file, or open another process's. Raises NoSharedMemory."""
        self.path, self.slots, self.shape = path, slots, shape
        head = slots * np.dtype(np.int64).itemsize
        self.size = head + slots * int(np.prod(shape))
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        remedy = "give the container more (--shm-size), or use fewer --slots or a smaller queue"
        try:
            if create:
                reserve(handle, self.size, "pixels", remedy)
            self._map = mmap.mmap(handle, self.size)
        finally:
            os.close(handle)
        self.started = np.frombuffer(self._map, np.int64, slots)
        self._all = np.frombuffer(self._map, np.uint8, offset=head).reshape(slots, *shape)
        self._free = list(range(slots))

    def __getitem__(self, slot: int) -> np.ndarray:
        """The pixels in a slot: a view, uint8 of the store's shape."""
        return self._all[slot]

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def take(self) -> int:
        """Take a free slot; there must be one (`has_room`)."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Free a slot whose request is over."""
        self._free.append(slot)


class RunFolder:
    """The folder of a run, in /dev/shm if that is writable, locked while it is used.

    A process id would not tell whether a run is alive: containers that share /dev/shm number their
    processes separately. The system releases a lock when its owner dies, in any container.
    """

    def __init__(self) -> None:
        """Create the folder, and remove those of dead runs."""
        shared = Path("/dev/shm")
        parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
        for folder in parent.glob(f"{_PREFIX}*"):
            if _abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        unlocked = self.path / f"{_LOCK}.new"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unlocked.rename(self.path / _LOCK)

    @property
    def present(self) -> bool:
        """Whether the folder is still there."""
        return (self.path / _LOCK).exists()

    def remove(self) -> None:
        """Delete the folder, and release its lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _abandoned(folder: Path) -> bool:
    """Whether no run holds a folder's lock; a folder that can't be read is another user's."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        return time.time() - _made(folder) > _FRESH_SECONDS
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _made(folder: Path) -> float:
    """Time of a folder's last change; now, if the folder was just removed."""
    try:
        return folder.stat().st_mtime
    except OSError:
        return time.time()
