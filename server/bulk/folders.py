"""Image files: single ones, those of folders, those that a pattern finds."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from threading import Event
from urllib.parse import urlsplit

from runtime.model.preprocess import SUFFIXES
from server.bulk.fetching import file_system, is_url
from server.bulk.items import Item


@dataclass(frozen=True, slots=True)
class Found:
    """A file. name: relative to what was given. itself: it is what was given. wrong: why it, or a
    folder, can't be read.
    """

    location: str
    name: str
    itself: bool = False
    wrong: str | None = None

    @property
    def meant(self) -> bool:
        """Whether it has a row: who names a file means it, whatever it is called."""
        return self.itself or self.wrong is not None or self.suffix in SUFFIXES

    @property
    def suffix(self) -> str:
        """In small letters."""
        return PurePosixPath(self.name).suffix.lower()


@dataclass(frozen=True, slots=True)
class Files:
    """The images that a path, folder or pattern means. skipped: counts of what is none, by suffix.

    Of a folder or pattern it is what is named like an image, at any depth, without what is hidden:
    previews, caches, versions.
    """

    path: str
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def items(self) -> Iterator[Item]:
        """Each file, in the order of their names, folder by folder."""
        for found in matches(self.path):
            if found.wrong is not None:
                yield Item(plain(found.location), wrong=found.wrong)
            elif found.meant:
                yield Item(plain(found.location), found.location, _stem(found.name))
            else:
                self.skipped[found.suffix or found.name] += 1

    def count(self, over: Event) -> int | None:
        """How many there are, or None: elsewhere, listing them twice takes long."""
        if is_url(self.path):
            return None
        return sum(found.meant for found in matches(self.path) if not over.is_set())


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


def matches(path: str) -> Iterator[Found]:
    """Files that a path, folder or pattern means. Raises NoWay."""
    return _remote(path) if is_url(path) else _local(path)


def _local(path: str) -> Iterator[Found]:
    if is_pattern(path):
        import glob

        for found in map(Path, sorted(glob.iglob(path, recursive=True))):  # noqa: PTH207 - any root
            if not found.is_dir():
                yield Found(str(found), found.name if found.is_absolute() else str(found))
    elif Path(path).is_dir():
        yield from _walk(Path(path))
    else:
        yield Found(path, path, itself=True)


def _walk(top: Path) -> Iterator[Found]:
    """Its files at any depth, in order; also links that lead nowhere, which are told as such."""
    left = [top]
    while left:
        entry = left.pop()
        found = Found(str(entry), str(entry.relative_to(top)))
        try:
            if entry.is_dir():
                if entry == top or not entry.is_symlink():
                    left += sorted(_shown(entry), reverse=True)
            elif entry.is_file() or entry.is_symlink():
                yield found
        except OSError as error:
            yield replace(found, wrong=str(error))


def _shown(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _remote(url: str) -> Iterator[Found]:
    """The same over fsspec."""
    system, path = file_system(url)
    if is_pattern(url):
        found = sorted(system.glob(path))
    elif PurePosixPath(path).suffix.lower() in SUFFIXES or not system.isdir(path):
        yield Found(url, url, itself=True)
        return
    else:
        found = system.find(path)
    root = path.rstrip("/") + "/"
    for each in found:
        name = each.removeprefix(root)
        if not any(part.startswith(".") for part in PurePosixPath(name).parts):
            yield Found(system.unstrip_protocol(each), name)
