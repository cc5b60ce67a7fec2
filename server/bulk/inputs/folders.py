"""Image files: single ones, those in folders, those that match a pattern."""

import errno
import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any, Literal
from urllib.parse import urlsplit

from runtime.model.preprocess import SUFFIXES
from server.bulk.inputs.fetching import file_system, is_url
from server.bulk.inputs.items import Item, UnfitItem
from server.bulk.inputs.web import WEB
from server.bulk.inputs.web_pages import WebPages

_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_ESCAPED = re.compile(r"\\[xu\\]")
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|\\)")


@dataclass(frozen=True, slots=True)
class Found:
    """A file or folder. name: relative to the argument. wrong: why it can't be read.

    kind: "named" for a file that is the argument, "listed" for a folder whose entries follow,
    "passed" for one whose entries do not, because a pattern matches it alone.
    """

    location: str
    name: str
    kind: Literal["file", "named", "listed", "passed"] = "file"
    wrong: str | None = None

    @property
    def meant(self) -> bool:
        """Whether the file gets a row: one that is named explicitly does, whatever its suffix."""
        if self.kind == "file":
            return self.wrong is not None or self.suffix in SUFFIXES
        return self.kind == "named"

    @property
    def suffix(self) -> str:
        """The name's suffix in lower case."""
        return PurePosixPath(self.name).suffix.lower()


@dataclass(frozen=True, slots=True)
class Files:
    """The images of a path, folder or pattern. skipped: counts of other files, by suffix.

    Of a folder or pattern these are the files with an image's suffix, at any depth, except hidden
    ones: previews, caches, versions.
    """

    path: str
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    def items(self, readable: Callable[[str], object] = lambda item_id: None) -> Iterator[Item]:
        """An item for each file, ordered by name, folder by folder.

        readable: called with the id of each folder that was listed, under which an error would be.
        """
        for found in matches(self.path):
            if found.kind == "listed":
                readable(plain(found.location))
            elif found.wrong is not None:
                yield Item(plain(found.location), wrong=found.wrong)
            elif found.meant:
                yield Item(plain(found.location), found.location, _stem(found.name))
            else:
                kind = found.suffix or found.name
                self.skipped["folders" if found.kind == "passed" else kind] += 1

    def count(self, over: Event) -> int | None:
        """The number of images; None for a URL, where listing twice takes long."""
        if is_url(self.path):
            return None
        return sum(found.meant for found in matches(self.path) if not over.is_set())


def plain(name: str) -> str:
    """A file's name as UTF-8. A byte that is not UTF-8 becomes \\xNN, any other lone surrogate
    \\uNNNN, and in such a name, or in one that looks like it, a backslash becomes \\\\, so that
    `restored` gives it back.
    """
    if not (any("\ud800" <= c <= "\udfff" for c in name) or _ESCAPED.search(name)):
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


def restored(name: str) -> str:
    """The file's name of which `plain` made this one."""
    return _ESCAPE.sub(_unescaped, name)


def _unescaped(found: re.Match[str]) -> str:
    kind, digits = found[1][0], found[1][1:]
    return kind if kind == "\\" else chr(int(digits, 16) + (0xDC00 if kind == "x" else 0))


def named(location: str) -> str:
    """The path below an output folder for a location: without root, dot parts and suffix."""
    return _stem(below(urlsplit(location).path if is_url(location) else location))


def below(path: str) -> str:
    """A path without root and dot parts, so that it can't leave its folder."""
    return "/".join(
        part for part in PurePosixPath(path).parts if part not in ("/", "//", "..", ".")
    )


def _stem(name: str) -> str:
    """The name without its last suffix; of an absolute path only the file's name."""
    path = PurePosixPath(name)
    path = PurePosixPath(path.name if path.is_absolute() else below(name))
    return plain(str(path.parent / path.stem))


def is_pattern(path: str) -> bool:
    """Whether a path is a shell pattern, unless a file of that very name exists."""
    return _has_wildcards(path) and (is_url(path) or not os.path.lexists(path))


def _has_wildcards(text: str) -> bool:
    return any(c in text for c in "*?[")


def matches(path: str) -> Iterator[Found]:
    """Files of a path, folder or pattern. Raises NoWay."""
    return _remote(path) if is_url(path) else _local(path)


def _local(path: str) -> Iterator[Found]:
    if is_pattern(path):
        for found in _matching(path):
            file = Path(found.location)
            yield replace(found, name=file.name if file.is_absolute() else str(file))
    else:
        try:
            folder = stat.S_ISDIR(_mode(Path(path)))
        except OSError as error:
            yield Found(path, path, wrong=str(error))
        else:
            yield from _walk(Path(path)) if folder else [Found(path, path, "named")]


def _matching(pattern: str) -> Iterator[Found]:
    """Files that match a pattern. As in folders, `**` does not follow links to folders: they may
    lead in circles.
    """
    parts = Path(pattern).parts
    any_depth = parts.index("**") if "**" in parts else len(parts)
    for base in _expanded(Path(), parts[:any_depth]):
        path = Path(base.location)
        if base.wrong is not None:
            yield base
        elif any_depth == len(parts):
            try:
                yield replace(base, kind="passed") if stat.S_ISDIR(_mode(path)) else base
            except OSError as error:
                yield replace(base, wrong=str(error))
        else:
            for found in _walk(path):
                if (
                    found.kind == "listed"
                    or found.wrong is not None
                    or _fits(Path(found.name).parts, parts[any_depth:])
                ):
                    yield found


def _expanded(folder: Path, parts: tuple[str, ...]) -> Iterator[Found]:
    """What a pattern's parts lead to in a folder; as in a shell, no wildcard matches a leading dot.

    Unlike `glob`, this does not leave out a folder that can't be read.
    """
    literal = list(takewhile(lambda part: not _has_wildcards(part), parts))
    folder = folder.joinpath(*literal)
    if len(literal) == len(parts):
        if os.path.lexists(folder):
            yield Found(str(folder), str(folder))
        return
    first, *rest = parts[len(literal) :]
    try:
        names = sorted(fnmatch.filter(os.listdir(folder), first))  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield Found(str(folder), str(folder), wrong=str(error))
        return
    for name in names:
        if first.startswith(".") or not name.startswith("."):
            yield from _expanded(folder / name, (*rest,))


def _fits(names: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Whether a path's names match a pattern's parts."""
    return len(parts) in _places(names, parts)


def _places(names: tuple[str, ...], parts: tuple[str, ...]) -> set[int]:
    """Numbers of the parts that a path's names may match."""
    places = _next({0}, parts)
    for name in names:
        fit = {p for p in places if p < len(parts) and fnmatch.fnmatchcase(name, parts[p])}
        places = _next({place if parts[place] == "**" else place + 1 for place in fit}, parts)
    return places


def _next(places: set[int], parts: tuple[str, ...]) -> set[int]:
    """Places of the parts that the next name may match: `**` may stand for no name at all."""
    for place, part in enumerate(parts):
        if place in places and part == "**":
            places.add(place + 1)
    return places


def _walk(top: Path) -> Iterator[Found]:
    """A folder's files at any depth, in order; also broken links, which are reported as such."""
    left = [top]
    while left:
        entry = left.pop()
        found = Found(str(entry), str(entry.relative_to(top)))
        try:
            mode = _mode(entry)
            if stat.S_ISDIR(mode):
                if entry == top or not entry.is_symlink():
                    left += sorted(_shown(entry), reverse=True)
                    yield replace(found, kind="listed")
            elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
                yield found
        except OSError as error:
            yield replace(found, wrong=str(error))


def _mode(path: Path) -> int:
    """The mode of what a path leads to, of the link if that leads nowhere, and 0 if it has gone.

    Raises OSError: since Python 3.14 `Path.is_dir` and its kin are False of what can't be read.
    """
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _shown(folder: Path) -> Iterator[Path]:
    return (entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _remote(url: str) -> Iterator[Found]:
    """Like `_local`, through fsspec."""
    web = url.startswith(WEB)
    system, path = (WebPages(url), url) if web else file_system(url)
    has_query = web and "?" in url
    is_image = PurePosixPath(path).suffix.lower() in SUFFIXES
    if has_query or (not _has_wildcards(path) and (is_image or not system.isdir(path))):
        yield Found(url, url, "named")
        return
    root, parts = path.rstrip("/"), ["**"]
    if _has_wildcards(path):
        whole = path.split("/")
        literal = list(takewhile(lambda part: not _has_wildcards(part), whole))
        root, parts = "/".join(literal), whole[len(literal) :]
    for found in (
        _listed(system, root, tuple(parts)) if web or _has_folders(system) else _found(system, path)
    ):
        name = found.location.removeprefix(path.rstrip("/") + "/")
        yield replace(found, location=system.unstrip_protocol(found.location), name=name)


def _found(system: Any, path: str) -> Iterator[Found]:
    """Files of an object store, which knows no folders."""
    for each in sorted(system.glob(path)) if _has_wildcards(path) else system.find(path):
        if not any(part.startswith(".") for part in PurePosixPath(each).parts):
            yield Found(each, each)


def _listed(system: Any, top: str, parts: tuple[str, ...]) -> Iterator[Found]:
    """Files in a folder that match a pattern's parts. fsspec's own walk leaves out what it can't
    read.

    The entries of a web page may be deep below its folder.
    """
    left, known = [top], {top}
    while left:
        folder = left.pop()
        below = folder.removeprefix(top).strip("/")
        names = tuple(below.split("/")) if below else ()
        try:
            entries = sorted(system.ls(folder or "/", detail=True), key=lambda entry: entry["name"])
        except (OSError, UnfitItem) as error:
            yield Found(folder, folder, wrong=str(error))
            continue
        yield Found(folder, folder, "listed")
        folders: list[str] = []
        for entry in entries:
            location = entry["name"].rstrip("/")
            inside = location.removeprefix(f"{folder}/").split("/")
            hidden = any(not name or name.startswith(".") for name in inside)
            if hidden or not location.startswith(f"{folder}/"):
                continue  # a page may link to itself, or upwards
            places = _places((*names, *inside), parts)
            if entry["type"] != "directory":
                if len(parts) in places and location not in known:
                    yield Found(location, location)
                if len(inside) > 1:
                    known.add(location)  # the page of its own folder may follow
            elif location not in known and any(place < len(parts) for place in places):
                folders.append(location)
                known.add(location)
        left += reversed(folders)


def _has_folders(system: Any) -> bool:
    """Whether a file system lists files by fsspec's own walk through its folders."""
    from fsspec.asyn import AsyncFileSystem
    from fsspec.spec import AbstractFileSystem

    if isinstance(system, AsyncFileSystem):
        return type(system)._find is AsyncFileSystem._find
    return type(system).find is AbstractFileSystem.find
