"""Logging, as text for people or as one JSON object a line for machines.

Logging never blocks: a thread writes the lines, and while nobody reads them, lines are dropped and
counted. Messages are escaped and cut, so that client input can't forge a log line.
"""

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

from server.settings import Settings

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_TEXT = "%(asctime)s %(levelname)s %(message)s"
_FILE = 2  # standard error
_WAITING = 1000  # lines
_MESSAGE, _TRACEBACK = 2000, 10_000  # characters
_FLUSH_SECONDS = 1.0
_SELDOM_SECONDS = 60.0


def plain(text: str, most: int, keep: str = "") -> str:
    """Cut a text to `most` characters, and escape those that end a line or control a terminal."""
    cut = text if len(text) <= most else text[:most] + "…"
    if cut.isprintable():
        return cut
    return "".join(
        c
        if c.isprintable() or c in keep
        else c.encode("unicode_escape", "backslashreplace").decode()
        for c in cut
    )


class _Text(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name there
        record.message = plain(record.message, _MESSAGE)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        return plain(super().formatException(ei), _TRACEBACK, "\n")  # type: ignore[arg-type]


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": plain(record.getMessage(), _MESSAGE),
        }
        line |= getattr(record, "fields", {})
        if (current := request_id.get()) is not None:
            line["request_id"] = current
        if record.exc_info:
            line["exception"] = plain(self.formatException(record.exc_info), _TRACEBACK, "\n")
        return json.dumps(line, ensure_ascii=False)


class _Unblocked(logging.Handler):
    """Hands lines to a thread that writes them to a file; lines it can't write are counted."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self._file, self._dropped = file, 0
        self._lines: queue.Queue[str] = queue.Queue(_WAITING)
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # a wrong log call must not fail its caller
            line = f"ERROR {record.pathname}:{record.lineno}: wrong log call: {error!r}"
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            try:
                if self._dropped:
                    dropped, self._dropped = self._dropped, 0
                    line += f"\n{dropped} lines were dropped, for nobody read them"
                data = (line + "\n").encode(errors="backslashreplace")
                while data:
                    data = data[os.write(self._file, data) :]
            except OSError:
                self._dropped += 1  # closed, or full: there is nowhere to report it
            self._lines.task_done()

    def flush(self) -> None:
        """Wait up to `_FLUSH_SECONDS` until all lines are written; `logging` calls this at exit."""
        end = time.monotonic() + _FLUSH_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)


class RateLimitedLog:
    """Logs each message at most once a minute."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._said: dict[str, float] = {}

    def warning(self, message: str, *values: object) -> None:
        """Log a warning, unless the same message was logged within the last minute."""
        if self.due(message):
            self._log.warning(message, *values)

    def due(self, message: str) -> bool:
        """Whether a message was not due within the last minute."""
        now = self._clock()
        if now - self._said.get(message, -_SELDOM_SECONDS) < _SELDOM_SECONDS:
            return False
        self._said[message] = now
        return True


def flush() -> None:
    """Wait up to `_FLUSH_SECONDS` until the lines logged so far are written."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def configure(settings: Settings) -> None:
    """Send this process's log to standard error."""
    handler = _Unblocked(_FILE)
    handler.setFormatter(_Json() if settings.log_format == "json" else _Text(_TEXT))
    logging.basicConfig(level=settings.log_level, handlers=[handler], force=True)
    if settings.log_level != "DEBUG":  # it logs each request that is not HTTP
        logging.getLogger("tornado.general").setLevel("WARNING")
