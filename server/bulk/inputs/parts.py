"""Turns the arguments of `vignette caption` into parts that stream items."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from msgspec import structs

from runtime.errors import VignetteError
from server.bulk.inputs.fetching import as_path, is_url
from server.bulk.inputs.folders import Files, is_pattern, matches, plain
from server.bulk.inputs.items import Item, NoWay
from server.bulk.inputs.lists import Columns, ListFile, NoColumn
from server.bulk.inputs.shards import Shard

Part = Files | ListFile | Shard
_SHARDS = (".tar", ".tar.gz", ".tgz")
_BROKEN = (
    VignetteError, OSError, ValueError, ArithmeticError, csv.Error, RecursionError,
    NotImplementedError,
)  # fmt: skip
_LISTS = (*ListFile.suffixes, *_SHARDS)  # files with several images
_PACKED = (".zip", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")  # and .tar.gz, which is read


class NoImages(VignetteError):
    """There is nothing to caption."""


def parts(given: Iterable[str], columns: Columns, limit: int, output: str = "-") -> list[Part]:
    """A part for each argument. limit: bytes of an image in a shard. output: where captions go,
    which no pattern matches.

    Raises NoImages for a path that does not exist, or is packed in a way that is not read.
    """
    found: list[Part] = []
    for path in dict.fromkeys(each for pattern in given for each in _expanded(pattern, output)):
        if not (path == "-" or is_url(path) or is_pattern(path) or os.path.lexists(path)):
            raise NoImages(f"{path} does not exist")
        if path == "-" or path.lower().endswith(ListFile.suffixes):
            listed = ListFile(path, columns)
            first = next((part for part in found if isinstance(part, ListFile)), listed)
            found.append(replace(listed, with_folder=listed.folder != first.folder))
        elif path.lower().endswith(_SHARDS):
            found.append(Shard(path, columns, limit))
        elif path.lower().endswith(_PACKED) and os.path.isfile(as_path(path)):  # noqa: PTH113
            raise NoImages(f"{path} is not read: unpack it (archives are {', '.join(_SHARDS)})")
        else:
            found.append(Files(path))
    return found


def _expanded(path: str, output: str) -> list[str]:
    """Expand a pattern of lists or shards, leaving out the output of an earlier run; keep a
    pattern of images, which may match millions.

    Raises NoImages if nothing matches.
    """
    if not is_pattern(path) or not path.lower().endswith(_LISTS):
        return [path]
    made = (output, f"{output}.rows.jsonl")
    found = [each.location for each in matches(path) if each.kind in ("file", "named")]
    found = [each for each in found if not any(_same(each, one) for one in made)]
    if not found:
        raise NoImages(f"nothing is called like {path}")
    return found


def _same(path: str, other: str) -> bool:
    return os.path.realpath(as_path(path)) == os.path.realpath(other)


def split(parts: Iterable[Part]) -> list[Part]:
    """Split parts into smaller ones that can be read in parallel."""
    return [each for part in parts for each in _pieces(part)]


def _pieces(part: Part) -> Sequence[Part]:
    try:
        return part.parts() if isinstance(part, ListFile) else [part]
    except Exception as error:
        if not _is_of_input(part, error):
            raise
        return [part]  # whose items will tell


def _written(item: Item, prompt: str | None) -> Item:
    """The item with its prompt, or the run's, and with texts that can be written as UTF-8, whatever
    bytes its list or shard had.
    """
    texts = {"id": item.id, "name": item.name, "key": item.key, "prompt": item.prompt}
    changed = {name: plain(text) for name, text in texts.items() if text and not _is_utf8(text)}
    if prompt and not item.prompt:
        changed["prompt"] = prompt
    return structs.replace(item, **changed) if changed else item


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _end(part: Part) -> str:
    """The id under which a part that breaks off has an error."""
    return plain(part.path) if isinstance(part, Files) else f"{plain(part.path)}#end"


def _is_of_input(part: Part, error: Exception) -> bool:
    """Whether an error is the input's, which gets a row for it, not the caller's or this program's.

    Local files raise only those of _BROKEN; each file system of fsspec has its own.
    """
    known = isinstance(error, _BROKEN) or is_url(part.path)
    return known and not isinstance(error, NoColumn | NoWay)


def items(
    parts: Iterable[Part],
    readable: Callable[[str], object] = lambda item_id: None,
    prompt: str | None = None,
) -> Iterator[Item]:
    """The items of all parts, in order. A part that breaks off yields an item with the error.

    readable: called with each id under which an error would have been yielded, and was not: of a
    list or shard that was read to its end, a folder that was listed, a list's row that was read.
    prompt: of items that have none.

    Raises NoColumn and NoWay.
    """
    for part in parts:
        try:
            found = part.items() if isinstance(part, Shard) else part.items(readable)
            yield from (_written(item, prompt) for item in found)
            if not isinstance(part, Files):
                readable(_end(part))
        except Exception as error:
            if not _is_of_input(part, error):
                raise
            yield Item(_end(part), prompt=prompt, wrong=f"it can't be read to its end: {error}")
