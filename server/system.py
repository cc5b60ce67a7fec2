"""System calls that differ between Linux and other systems.

Features that other systems lack are listed here: macOS does not limit address space (the estimate
of an image's memory still counts), and does not preallocate files.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPERATORS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1,
                     signal.SIGUSR2)  # fmt: skip
# Exit codes of a process that was killed from outside.
KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
NICENESS = 5  # of workers and image decoder processes
_FILES = 65536  # most open files of a process: keeps tables of all descriptors small
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_LOOK_SECONDS = 0.5


def follow_parent() -> None:
    """Die with the parent process, and leave signals to it.

    A terminal's Ctrl-C and some service managers signal a whole process group; the supervisor
    decides what to end, and in which order.
    """
    for number in OPERATORS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    try:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    except AttributeError:  # not Linux
        threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()
    if parent is not None and not parent.is_alive():  # it died before the call above
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def own_memory() -> int:
    """Resident bytes of this process that are neither shared nor a file's; 0 if not on Linux."""
    try:
        counts = Path("/proc/self/statm").read_text()
    except FileNotFoundError:
        return 0
    _, resident, shared, *_ = map(int, counts.split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def trim_memory() -> None:
    """Return free memory to the system: glibc keeps it while any block above is in use."""
    with contextlib.suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def give_way(niceness: int = NICENESS, process: int | None = None) -> None:
    """Lower the priority of this process, or of a child, below that of front-ends, whose tasks are
    short and waited for.

    Otherwise a server whose cores are all busy takes long to answer that it is full.
    """
    lower = os.getpriority(os.PRIO_PROCESS, 0) + niceness
    with contextlib.suppress(ProcessLookupError):  # the child has ended
        os.setpriority(os.PRIO_PROCESS, process or 0, lower)


def limit_memory(size: int, children: int | None = None) -> None:
    """Limit the address space to `size` bytes, where the system can, and disable core dumps.

    children: the most that they may set for themselves.
    """
    if hasattr(resource, "RLIMIT_AS"):
        resource.setrlimit(resource.RLIMIT_AS, (size, max(size, children or 0)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def raise_file_limit() -> None:
    """Raise the open-file limit of this process and its children as far as allowed, to `_FILES`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allocate(handle: int, size: int) -> None:
    """Set a file's size and, on Linux, reserve its space: a later shortage would be a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


def check_listens(address: str, seconds: float = 10.0) -> None:
    """Raise OSError unless something accepts connections at `host:port`; other addresses pass."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        host = host.removeprefix("ray://").strip("[]")
        socket.create_connection((host, int(port)), seconds).close()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for children that are started within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
