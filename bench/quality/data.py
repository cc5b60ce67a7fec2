"""Pictures with what people said of them."""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import VignetteError

_NAMES = ("image", "file_name", "path", "file")  # of a table's column of images
_SAID = ("caption", "reference", "references", "captions", "text")


class NoData(VignetteError):
    """A file of references that can't be used."""


@dataclass(frozen=True, slots=True)
class Picture:
    """file: where it is. references: at least one."""

    file: Path
    references: tuple[str, ...]
    prompt: str | None = None


def read(data: Path, images: Path, limit: int | None = None) -> list[Picture]:
    """COCO's format (`images` and `annotations`), a list of objects, JSON lines, or CSV.

    Tables have a column image (or file_name, path, file) and one of references: caption,
    reference or text with one each, several rows to an image, or captions, references with a list;
    optionally prompt. Raises NoData.
    """
    try:
        found = _coco(data) if _is_coco(data) else _table(data)
    except (OSError, ValueError, LookupError, TypeError) as cause:
        raise NoData(f"{data} can't be read as references: {cause!r}") from cause
    pictures = []
    for (name, prompt), references in list(found.items())[:limit]:
        file = images / name
        if not file.is_file():
            raise NoData(f"{data} names {name}, which is not in {images}")
        pictures.append(Picture(file, tuple(references), prompt))
    if not pictures:
        raise NoData(f"{data} has no references")
    return pictures


_Found = dict[tuple[str, str | None], list[str]]


def _is_coco(data: Path) -> bool:
    if data.suffix.lower() != ".json":
        return False
    return isinstance(json.loads(data.read_text()), dict)


def _coco(data: Path) -> _Found:
    content = json.loads(data.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"]}
    found: _Found = defaultdict(list)
    for annotation in content["annotations"]:
        found[names[annotation["image_id"]], None].append(annotation["caption"])
    return found


def _table(data: Path) -> _Found:
    found: _Found = defaultdict(list)
    for row in _rows(data):
        name, said = _of(row, _NAMES), _of(row, _SAID)
        found[name, row.get("prompt") or None] += [said] if isinstance(said, str) else said
    return found


def _of(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    for column in columns:
        if row.get(column):
            return row[column]
    raise LookupError(f"a row has none of {', '.join(columns)}")


def _rows(data: Path) -> list[dict[str, Any]]:
    if data.suffix.lower() == ".csv":
        with data.open(newline="", encoding="utf-8-sig") as stream:
            return list(csv.DictReader(stream))
    text = data.read_text()
    if data.suffix.lower() == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return list(json.loads(text))
