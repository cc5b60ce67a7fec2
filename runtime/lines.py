"""A file of captions, a JSON object a line, that a later run can go on with."""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from runtime.errors import VignetteError
from runtime.request import Caption


class NotOurs(VignetteError):
    """The file holds something else, or another run writes to it."""


class CaptionLines:
    """Appends outcomes. `done` are the files that have a caption already."""

    def __init__(self, stream: IO[str], about: dict[str, str], done: Iterable[str] = ()) -> None:
        """about: what all lines say, such as the model."""
        self._stream, self._about, self.done = stream, about, frozenset(done)

    @classmethod
    @contextmanager
    def resume(
        cls, path: Path, about: dict[str, str], files: Iterable[str]
    ) -> "Iterator[CaptionLines]":
        """Go on with what is in `path`, where failures of `files` are taken out, to be tried again.

        Raises NotOurs, with the file as it was, when it holds anything but lines about the same.
        """
        path = path.resolve()  # what is replaced is the file, not a link to it
        with ExitStack() as held:
            stream = held.enter_context(_locked(path))
            stream.seek(0)
            lines = stream.readlines()
            done, kept = _sorted(lines, path, about, set(files))
            if len(kept) < len(lines):
                partial = path.with_name(f".{path.name}.partial")
                stream = held.enter_context(_locked(partial))
                stream.truncate(0)
                stream.writelines(kept)
                stream.flush()
                partial.replace(path)
            yield cls(stream, about, done)

    def write(self, file: Path, outcome: Caption | Exception) -> None:
        """Add a line, at once."""
        line: dict[str, Any] = {"file": str(file), **self._about}
        if isinstance(outcome, Caption):
            line |= {"caption": outcome.text, "finish_reason": outcome.finish_reason}
        else:
            line["error"] = str(outcome)
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)


def opened(file: Path | int, mode: str) -> IO[str]:
    """Text whose file names need not be UTF-8: they are written as they are."""
    kept = isinstance(file, Path)
    return open(file, mode, encoding="utf-8", errors="surrogateescape", closefd=kept)


def _locked(path: Path) -> IO[str]:
    stream = opened(path, "a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise NotOurs(f"another run writes to {path}: name another output") from None
    return stream


def _sorted(
    lines: list[str], path: Path, about: dict[str, str], files: set[str]
) -> tuple[set[str], list[str]]:
    """Files that have a caption, and the lines to keep."""
    done, kept = set(), []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break  # the last run was killed while it wrote this
        entry = _entry(line, f"{path}, line {number},")
        for key in ("model", "prompt"):
            if entry.get(key) != about.get(key):
                raise NotOurs(f"{path} was made with another {key}: name another output")
        if "caption" in entry:
            done.add(entry["file"])
        if "caption" in entry or entry["file"] not in files:
            kept.append(line)
    return done, kept


def _entry(line: str, where: str) -> dict[str, str]:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "file" not in entry:
        raise NotOurs(f"{where} is no caption: name another output")
    return entry
