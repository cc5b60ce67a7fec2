"""Files that a run locks, and replaces only by complete ones."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE
from typing import BinaryIO

from server.bulk.outputs.base import OutputConflict


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file that replaces `path`, with its permissions, when it is complete.

    One left by a killed run is removed; if that is a link, its target is left alone.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as stream:
            if path.exists():
                os.fchmod(stream.fileno(), S_IMODE(path.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_regular(path: Path) -> None:
    """Raise OutputConflict if the path exists and is no regular file, such as a link or pipe."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OutputConflict(f"{path} is no regular file: remove it, or name another output")


def remove_empty(path: Path) -> None:
    """Remove a file that is still locked, if it is empty."""
    if path.exists() and path.stat().st_size == 0:
        path.unlink()


def locked(path: Path) -> BinaryIO:
    """Open and lock a file to read and append to.

    Raises OutputConflict if another run has it, or it is no regular file.
    """
    while True:
        check_regular(path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        stream = os.fdopen(os.open(path, flags, 0o666), "a+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise OutputConflict(f"another run writes to {path}: name another output") from None
        if is_at(path, stream):
            return stream
        stream.close()  # another run has just replaced the file


def is_at(path: Path, stream: BinaryIO) -> bool:
    """Whether an open file is still the one that its path names."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))
