"""Image files: single ones, those of folders, those that a pattern finds."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from runtime.model.preprocess import SUFFIXES
from server.bulk.fetching import is_url
from server.bulk.items import Item


@dataclass(frozen=True, slots=True)
class Files:
    """The images that a path, folder or pattern means. skipped: counts of what is none, by suffix.

    Whoever names a file means it, whatever it is called. Of a folder it is what is named like an
    image, at any depth, without what is hidden: previews, caches, versions.
    """

    path: str
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def items(self) -> Iterator[Item]:
        """Each file, in the order of their names, folder by folder."""
        for location, name in matches(self.path):
            suffix = PurePosixPath(name).suffix.lower()
            if suffix in SUFFIXES or name == location:
                yield Item(plain(location), location, _stem(name if name != location else location))
            else:
                self.skipped[suffix or name] += 1

    def count(self, over: Event) -> int | None:
        """How many there are, or None: elsewhere, listing them twice takes long."""
        if is_url(self.path):
            return None
        found = (
            PurePosixPath(name).suffix.lower() in SUFFIXES or name == location
            for location, name in matches(self.path)
            if not over.is_set()
        )
        return sum(found)


def plain(name: str) -> str:
    """A file's name as UTF-8. A byte that is none is written \\xNN, another half of a surrogate
    pair \\uNNNN, and a backslash \\\\ then, so that
    `bytes(name, "latin-1", "backslashreplace").decode("unicode_escape")` finds it again.
    """
    if not any("\ud800" <= c <= "\udfff" for c in name):
        return name
    escaped = name.replace("\\", "\\\\")
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}"
        if "\udc80" <= c <= "\udcff"
        else f"\\u{ord(c):04x}"
        if "\ud800" <= c <= "\udfff"
        else c
        for c in escaped
    )


def named(location: str) -> str:
    """A path below an output folder for what lies at a location: without root, dots and suffix."""
    return _stem(below(urlsplit(location).path if is_url(location) else location))


def below(path: str) -> str:
    """A path without root and dots: it leads nowhere else."""
    return "/".join(
        part for part in PurePosixPath(path).parts if part not in ("/", "//", "..", ".")
    )


def _stem(name: str) -> str:
    """Without its last suffix; of what is no relative path the file's name alone."""
    path = PurePosixPath(name)
    path = PurePosixPath(path.name if path.is_absolute() else below(name))
    return plain(str(path.parent / path.stem))


def is_pattern(path: str) -> bool:
    """Whether it stands for other names, as in a shell; a file may be called so all the same."""
    return any(c in path for c in "*?[") and (is_url(path) or not os.path.lexists(path))


def matches(path: str) -> Iterator[tuple[str, str]]:
    """Files that a path, folder or pattern means, and their names relative to what was given."""
    return _remote(path) if is_url(path) else _local(path)


def _local(path: str) -> Iterator[tuple[str, str]]:
    if is_pattern(path):
        import glob

        for found in map(Path, sorted(glob.iglob(path, recursive=True))):  # noqa: PTH207 - any root
            if not found.is_dir():
                yield str(found), found.name if found.is_absolute() else str(found)
    elif Path(path).is_dir():
        for file in _walk(Path(path)):
            yield str(file), str(file.relative_to(path))
    else:
        yield path, path


def _walk(folder: Path) -> Iterator[Path]:
    """Its files at any depth, in order; also links that lead nowhere, which are told as such."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(entry)
        elif entry.is_file() or entry.is_symlink():
            yield entry


def _remote(url: str) -> Iterator[tuple[str, str]]:
    """The same over fsspec."""
    import fsspec

    system: Any
    system, path = fsspec.core.url_to_fs(url)
    if is_pattern(url):
        found = sorted(system.glob(path))
    elif PurePosixPath(path).suffix.lower() in SUFFIXES or not system.isdir(path):
        yield url, url
        return
    else:
        found = system.find(path)
    root = path.rstrip("/") + "/"
    for each in found:
        name = each.removeprefix(root)
        if not any(part.startswith(".") for part in PurePosixPath(name).parts):
            yield system.unstrip_protocol(each), name
