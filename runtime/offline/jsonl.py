"""A file of captions, a JSON object a line, that a later run can go on with."""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from msgspec.structs import fields

from runtime.errors import VignetteError
from runtime.request import Caption, SamplingParams

About = dict[str, Any]
_SAMPLING = (field.name for field in fields(SamplingParams))
_DECIDE = ("model", "engine", "precision", "prompt", *_SAMPLING)  # what a caption says


class OutputConflict(VignetteError):
    """The file holds something else, or another run writes to it."""


class CaptionLines:
    """Appends outcomes. `done` are the files that have a caption already."""

    def __init__(self, stream: IO[str], about: About, done: Iterable[str] = ()) -> None:
        """about: what all lines say: the model, and what else decides a caption."""
        self._stream, self._about, self.done = stream, about, frozenset(done)

    @classmethod
    @contextmanager
    def resume(
        cls, path: Path, about: About, files: Iterable[Path], again: bool = False
    ) -> "Iterator[CaptionLines]":
        """Go on with what is in `path`, where failures of `files` are taken out, to be tried again.

        again: captions that were made otherwise, or of a file that has changed since, are taken
        out, too. Raises OutputConflict, with the file as it was, for those without it, and when it
        holds anything but captions.
        """
        path = path.resolve()  # what is replaced is the file, not a link to it
        with ExitStack() as held:
            stream = held.enter_context(_locked(path))
            stream.seek(0)
            lines = stream.readlines()
            done, kept = _sorted(lines, path, about, {plain(file): file for file in files}, again)
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
        line: dict[str, Any] = {"file": plain(file), **self._about}
        if isinstance(outcome, Caption):
            line |= state(file)
            line |= _said(outcome)
            if outcome.others:
                line["captions"] = [_said(each) for each in (outcome, *outcome.others)]
        else:
            line["error"] = str(outcome).encode("utf-8", "backslashreplace").decode()
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)


def _said(caption: Caption) -> About:
    said = {"caption": caption.text, "finish_reason": caption.finish_reason}
    return said if caption.score is None else said | {"score": round(caption.score, 5)}


def plain(file: Path) -> str:
    """A file's name as UTF-8. A byte that is none is written \\xNN, and a backslash \\\\ then,
    so that `bytes(name, "latin-1", "backslashreplace").decode("unicode_escape")` finds it again.
    """
    name = str(file)
    if name.isprintable() or not any("\udc80" <= c <= "\udcff" for c in name):
        return name
    escaped = name.replace("\\", "\\\\")
    return "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in escaped)


def state(file: Path) -> About:
    """By which a file is known again: its size in bytes, and when it was changed (ns)."""
    try:
        found = file.stat()
    except OSError:
        return {}
    return {"size": found.st_size, "modified": found.st_mtime_ns}


def opened(file: Path | int, mode: str) -> IO[str]:
    """A text file in UTF-8, where older lines may hold other bytes; a number stays open."""
    kept = isinstance(file, Path)
    return open(file, mode, encoding="utf-8", errors="surrogateescape", closefd=kept)


def _locked(path: Path) -> IO[str]:
    stream = opened(path, "a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise OutputConflict(f"another run writes to {path}: name another output") from None
    return stream


def _sorted(
    lines: list[str], path: Path, about: About, files: dict[str, Path], again: bool
) -> tuple[set[str], list[str]]:
    """Files that have a caption, and the lines to keep."""
    done, kept = set(), []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break  # the last run was killed while it wrote this
        entry = _entry(line, f"{path}, line {number},")
        name = entry["file"]
        if "caption" in entry:
            other = _difference(entry, about, files.get(name))
            if other and not again:
                raise OutputConflict(
                    f"{path}, line {number}: {name} was captioned with another {other}: name "
                    "another output, or caption such files anew with --again"
                )
            if other and name in files:
                continue
            done.add(name)
        if "caption" in entry or name not in files:
            kept.append(line)
    return done, kept


def _difference(entry: About, about: About, file: Path | None) -> str | None:
    """What about a caption is not as it would be made now, or None."""
    for key in (*_DECIDE, *about.keys() - set(_DECIDE)):
        if entry.get(key) != about.get(key):
            return key
    if file is not None and (now := state(file)) and now != {k: entry.get(k) for k in now}:
        return "content"
    return None


def _entry(line: str, where: str) -> About:
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or "file" not in entry:
        raise OutputConflict(f"{where} is no caption: name another output")
    return entry
