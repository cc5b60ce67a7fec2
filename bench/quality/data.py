"""Pictures with human reference captions."""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from msgspec import Struct, convert, json

from runtime.errors import VignetteError


class NoData(VignetteError):
    """A file of references that can't be used."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's file, and its references: at least one."""

    file: Path
    references: tuple[str, ...]
    prompt: str | None = None


def read(data: Path, images: Path, limit: int | None = None) -> list[Picture]:
    """Read COCO's format (`images` and `annotations`), a list of objects, JSON lines, or CSV.

    Tables have a column image (or file_name, path, file), optionally prompt, and one of references:
    caption, reference or text with one each, in several rows per image, or captions, references
    with a list. Images are paths below `images`, without "..". Raises NoData.
    """
    try:
        found = _by_picture(_content(data))
    except (OSError, ValueError, RecursionError, csv.Error) as cause:
        raise NoData(f"{data} can't be read as references: {cause}") from cause
    pictures = []
    for (name, prompt), references in list(found.items())[:limit]:
        file = images / name
        below = file.is_relative_to(images) and ".." not in Path(name).parts
        if not (below and file.is_file()):
            raise NoData(f"{data} names {name}, which is not in {images}: give paths below that")
        if not all(any(c.isalnum() for c in text) for text in references):
            raise NoData(f"{data}: a reference of {name} has no words: leave it out")
        pictures.append(Picture(file, tuple(references), prompt))
    if not pictures:
        raise NoData(f"{data} has no references")
    return pictures


_Found = dict[tuple[str, str | None], list[str]]
_Texts = str | list[str] | None


class _Image(Struct):
    id: int | str
    file_name: str


class _Annotation(Struct):
    image_id: int | str
    caption: str


class _Coco(Struct):
    images: list[_Image]
    annotations: list[_Annotation]


class _Row(Struct):
    """A row of a table; of synonymous columns the first that is not empty counts."""

    image: str | None = None
    file_name: str | None = None
    path: str | None = None
    file: str | None = None
    caption: _Texts = None
    reference: _Texts = None
    references: _Texts = None
    captions: _Texts = None
    text: _Texts = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, to which msgspec adds the row's place."""
        if not self.name:
            raise ValueError("a row has none of image, file_name, path, file")
        if not self.said:
            raise ValueError("a row has none of caption, reference, references, captions, text")

    @property
    def name(self) -> str:
        return self.image or self.file_name or self.path or self.file or ""

    @property
    def said(self) -> list[str]:
        said = self.caption or self.reference or self.references or self.captions or self.text
        return [said] if isinstance(said, str) else said or []


def _content(data: Path) -> _Coco | list[_Row]:
    if data.suffix.lower() == ".csv":
        with data.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        for place, row in enumerate(rows):
            if None in row:
                raise ValueError(f"more cells than columns (quote commas) - at `$[{place}]`")
        return convert(rows, list[_Row])
    content = data.read_bytes()
    if data.suffix.lower() == ".jsonl":
        return json.Decoder(_Row).decode_lines(content)
    return json.decode(content, type=_Coco | list[_Row])


def _by_picture(content: _Coco | list[_Row]) -> _Found:
    found: _Found = defaultdict(list)
    if isinstance(content, list):
        for row in content:
            found[row.name, row.prompt or None] += row.said
        return found
    names = {image.id: image.file_name for image in content.images}
    if len(names) < len(content.images):
        raise ValueError("two images have one id")
    for place, annotation in enumerate(content.annotations):
        if annotation.image_id not in names:
            raise ValueError(f"no image has its image_id - at `$.annotations[{place}]`")
        found[names[annotation.image_id], None].append(annotation.caption)
    return found
