"""Watches an engine's files in its worker: ONNX Runtime maps them, so that writing to one changes
what the engine says.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from runtime.model.manifest import sha256
from server.logs import flush

log = logging.getLogger(__name__)

_SECONDS = 1.0


def states(folder: Path) -> dict[str, os.stat_result]:
    """The states of a folder's files, to be taken before they are checked."""
    return {path.name: path.stat() for path in folder.iterdir() if path.is_file()}


def watch(folder: Path, files: Mapping[str, str], before: Mapping[str, os.stat_result]) -> None:
    """Kill this process once one of the files is written to, unless it stays what it was. One that
    is replaced, as exports do, stays as it was for who has it open.

    files: SHA-256 by name. before: see `states`.
    """
    arguments = folder, files, dict(before)
    threading.Thread(target=_watch, args=arguments, name="files", daemon=True).start()


def _watch(folder: Path, files: Mapping[str, str], seen: dict[str, os.stat_result]) -> None:
    while True:
        for name in files.keys() & seen.keys():
            path = folder / name
            try:
                new = path.stat()
                if not _written(new, seen[name]):
                    continue
                seen[name] = new
                same = sha256(path) == files[name]
            except OSError:
                continue  # it is away, and stays what it was for us
            if not same:
                log.error("%s was written to while it was in use: this worker ends", path)
                flush()
                os.kill(os.getpid(), signal.SIGKILL)  # no request is to blame
        time.sleep(_SECONDS)


def _written(new: os.stat_result, old: os.stat_result) -> bool:
    same = (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino)
    return same and (new.st_size, new.st_mtime_ns) != (old.st_size, old.st_mtime_ns)
