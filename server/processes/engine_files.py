"""Watches an engine's files in its worker: ONNX Runtime maps them, so that writing to one changes
what the engine says.
"""

import contextlib
import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from server.telemetry.logs import flush

log = logging.getLogger(__name__)

_SECONDS = 1.0


class EngineFiles:
    """The files of an engine folder, open since before they were checked: one whose name another
    takes, as exports do, stays as it was for who has it mapped, and may be written to still.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._open: dict[str, int] = {}
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(OSError):  # if the engine needs it, that ends the start
                self._open[path.name] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._seen = {name: _state(os.fstat(file)) for name, file in self._open.items()}
        self._digests: Mapping[str, str] = {}

    def watch(self, digests: Mapping[str, str]) -> None:
        """Check now and then from now on, once the engine has its files. digests: SHA-256 by file.

        A file that has another's name by now is watched in its place, as the engine may have that;
        if it holds something else, this process is killed.
        """
        self._digests = digests
        for name, digest in digests.items():
            if not self._is_there(name) and self._open_again(name) != digest:
                self._end(name, "was replaced while it was loaded")
        for name in self._open.keys() - digests.keys():
            os.close(self._open.pop(name))
        threading.Thread(target=self._watch, name="files", daemon=True).start()

    def _is_there(self, name: str) -> bool:
        try:
            there = (self._folder / name).stat()
            return os.path.samestat(there, os.fstat(self._open[name]))
        except (OSError, KeyError):
            return False

    def _open_again(self, name: str) -> str | None:
        """Open the file of that name now; its SHA-256, or None if it can't be read."""
        try:
            file = os.open(self._folder / name, os.O_RDONLY)
            self._seen[name] = _state(os.fstat(file))
            if name in self._open:
                os.close(self._open[name])
            self._open[name] = file
            return _sha256(file)
        except OSError:
            return None

    def _watch(self) -> None:
        while True:
            self.check()
            time.sleep(_SECONDS)

    def check(self) -> None:
        """Kill this process if a file was written to, unless it is what it was."""
        with self._lock:
            for name, digest in self._digests.items():
                try:
                    state = _state(os.fstat(self._open[name]))
                    if state == self._seen[name]:
                        continue
                    same = _sha256(self._open[name]) == digest
                except OSError as cause:  # nobody knows then what is mapped
                    self._end(name, f"can't be read any more ({cause})")
                if not same:
                    self._end(name, "was written to while it was in use")
                self._seen[name] = state

    def _end(self, name: str, why: str) -> NoReturn:
        log.error("%s %s: this worker ends", self._folder / name, why)
        flush()
        os.kill(os.getpid(), signal.SIGKILL)  # no request is to blame
        raise AssertionError("it was killed")


def _state(of: os.stat_result) -> tuple[int, int, int]:
    return of.st_size, of.st_mtime_ns, of.st_ctime_ns


def _sha256(file: int) -> str:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()
