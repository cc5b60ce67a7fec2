"""What the processes say to each other: small JSON messages over ZeroMQ, pixels in shared memory.

There, too, a worker notes what it is about to encode: a message would die with it.

A run has a folder of its own. In it every worker binds `worker-<index>-<epoch>`, to which each
front-end connects, and the supervisor binds `control`. A worker that is started again takes the
next epoch, so that nothing that was queued for the dead one reaches it by itself.

| from | to | messages |
| --- | --- | --- |
| front-end | worker | hello (its pixel file), caption, cancel |
| worker | front-end | answer, error, expired, failed (a step) |
| worker, front-end | supervisor | beat, ready, failed (to start) |
| worker | supervisor | found (its engine is whole: the port may open) |
| front-end | supervisor | refused (an image that killed two workers), drained |
| supervisor | front-end | workers (who serves, and what all refuse), drain |
| supervisor | worker | gone (a front-end that has died), stop |
"""

import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from runtime.errors import VignetteError

Message = dict[str, Any]
BEAT_SECONDS = 0.5
_PREFIX = "vignette-"
_NICENESS = 5


class NoSharedMemory(VignetteError):
    """There is no room for the pixels of the requests that may be inside."""


def packed(message: Message) -> bytes:
    """As it is sent."""
    return json.dumps(message, separators=(",", ":")).encode()


def unpacked(data: bytes) -> Message:
    """As it was meant."""
    return json.loads(data)


def control_address(folder: Path) -> str:
    """Where the supervisor listens."""
    return f"ipc://{folder}/control"


def process_name(kind: str, index: int, epoch: int) -> str:
    """A process's identity in one of its lives. kind: front or worker."""
    return f"{kind}-{index}-{epoch}"


def worker_address(folder: Path, index: int, epoch: int) -> str:
    """Where a worker listens, in one of its lives."""
    return f"ipc://{folder}/{process_name('worker', index, epoch)}"


def tell(folder: Path, name: str, message: Message) -> None:
    """One message to the supervisor, from before or after a process's life proper."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.identity = f"{name}-{message['op']}".encode()
    socket.connect(control_address(folder))
    socket.send(packed(message))
    socket.close(linger=2000)


def give_way() -> None:
    """Let front-ends go first: what they do is short, and somebody waits for each of it.

    Without it a server whose cores are all busy takes long to say that it is full.
    """
    os.nice(_NICENESS)


def follow_parent() -> None:
    """Die with the process that started this one, and leave signals to it.

    A terminal's Ctrl-C and some service managers signal a whole group; what to do then, and in
    which order, is the supervisor's business.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        parent_death = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # it died before that was in force
            os._exit(1)


class PixelStore:
    """A file in shared memory with room for the pixels of `slots` requests.

    Whoever decodes an image writes it into a slot, the worker reads it there, and the front-end
    that owns the file gives the slot to the next request once the first was answered.

    started: for each slot the number of the request in it that a worker began with, or 0.
    """

    def __init__(
        self, path: Path, slots: int, shape: tuple[int, ...], create: bool = False
    ) -> None:
        """Create the file, or open another process's. Raises NoSharedMemory without room."""
        self.path, self.slots, self.shape = path, slots, shape
        head = slots * np.dtype(np.int64).itemsize
        size = head + slots * int(np.prod(shape))
        handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
        try:
            if create:
                os.posix_fallocate(handle, 0, size)  # later there would be no error but a SIGBUS
            self._map = mmap.mmap(handle, size)
        except OSError as cause:
            raise NoSharedMemory(
                f"{path.parent} has no room for {size // 2**20} MiB of pixels ({cause.strerror}): "
                "give the container more (--shm-size), or use a smaller --max-queue"
            ) from cause
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
        """A free slot, if it has room."""
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The request of this slot is over."""
        self._free.append(slot)


def new_run_folder() -> Path:
    """A folder in memory, if the system has such a place; what killed runs left is removed."""
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
