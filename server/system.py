"""What a process asks of its system, where that is not the same on Linux and elsewhere.

What another system lacks is lost with a word here: macOS limits no address space (the estimate of
what an image takes still counts), and gives files no room beforehand.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OPERATORS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1,
                     signal.SIGUSR2)  # fmt: skip
# Exit codes of a process that somebody else ended.
KILLED_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
NICENESS = 5  # of workers and decoders
_FILES = 65536  # most that a process is allowed: tables of all of them are not to become large
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG
_LOOK_SECONDS = 0.5


def follow_parent() -> None:
    """Die with the process that started this one, and leave signals to it.

    A terminal's Ctrl-C and some service managers signal a whole group; what to do then, and in
    which order, is the supervisor's business.
    """
    for number in OPERATORS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    try:
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    except AttributeError:  # not Linux
        threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()
    if parent is not None and not parent.is_alive():  # it died before that was in force
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)


def own_memory() -> int:
    """Bytes in memory that are this process's alone and no file's; 0 if the system is not Linux."""
    try:
        counts = Path("/proc/self/statm").read_text()
    except FileNotFoundError:
        return 0
    _, resident, shared, *_ = map(int, counts.split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def trim_memory() -> None:
    """Give back to the system what is free: glibc keeps that as long as something lies above it."""
    with contextlib.suppress(AttributeError):  # another library's allocator
        ctypes.CDLL(None).malloc_trim(0)


def give_way(niceness: int = NICENESS) -> None:
    """Let front-ends go first: what they do is short, and somebody waits for each of it.

    Without it a server whose cores are all busy takes long to say that it is full.
    """
    os.nice(niceness)


def limit_memory(size: int) -> None:
    """Let this process have so many bytes of address space, where the system counts them."""
    if hasattr(resource, "RLIMIT_AS"):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def raise_file_limit() -> None:
    """Let this process, and those that it starts, have as many files as it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allocate(handle: int, size: int) -> None:
    """Give a file its size and, on Linux, its room: later there would be no error but a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Let a child that is started meanwhile see other variables."""
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
