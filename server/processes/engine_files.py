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
from server.telemetry.logs import flush

log = logging.getLogger(__name__)

_SECONDS = 1.0


class EngineFiles:
    """The files of an engine folder, as they were before they were checked."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        entries = folder.iterdir() if folder.is_dir() else ()
        self._seen = {path.name: path.stat() for path in entries if path.is_file()}
        self._digests: Mapping[str, str] = {}

    def watch(self, digests: Mapping[str, str]) -> None:
        """Check now and then from now on. digests: SHA-256 by file."""
        self._digests = {name: digests[name] for name in digests.keys() & self._seen.keys()}
        threading.Thread(target=self._watch, name="files", daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.check()
            time.sleep(_SECONDS)

    def check(self) -> None:
        """Kill this process if a file was written to, unless it is what it was. One that is
        replaced, as exports do, stays as it was for who has it open.
        """
        with self._lock:
            for name, digest in self._digests.items():
                path = self._folder / name
                try:
                    new = path.stat()
                    if not _written(new, self._seen[name]):
                        continue
                    self._seen[name] = new
                    same = sha256(path) == digest
                except OSError:
                    continue  # it is away
                if not same:
                    log.error("%s was written to while it was in use: this worker ends", path)
                    flush()
                    os.kill(os.getpid(), signal.SIGKILL)  # no request is to blame


def _written(new: os.stat_result, old: os.stat_result) -> bool:
    def state(of: os.stat_result) -> tuple[int, int, int]:
        return of.st_size, of.st_mtime_ns, of.st_ctime_ns

    return (new.st_dev, new.st_ino) == (old.st_dev, old.st_ino) and state(new) != state(old)
