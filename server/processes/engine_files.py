"""Watches an engine's files in its worker: ONNX Runtime maps them, so that writing to one changes
what the engine says.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from server.logs import flush

log = logging.getLogger(__name__)

_SECONDS = 1.0


def watch(folder: Path, names: Iterable[str]) -> None:
    """Kill this process once one of the files is written to. One that is replaced, as exports do,
    stays as it was for who has it open.
    """
    before = {path: path.stat() for path in map(folder.joinpath, names)}
    threading.Thread(target=_watch, args=(before,), name="files", daemon=True).start()


def _watch(before: dict[Path, os.stat_result]) -> None:
    while True:
        time.sleep(_SECONDS)
        for path, old in before.items():
            if _written(path, old):
                log.error("%s was written to while it was in use: this worker ends", path)
                flush()
                os.kill(os.getpid(), signal.SIGKILL)  # no request is to blame


def _written(path: Path, old: os.stat_result) -> bool:
    try:
        new = path.stat()
    except OSError:
        return False  # it is away, and stays what it was for us
    same = (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino)
    return same and (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns)
