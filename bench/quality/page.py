"""Results as a table for terminals, and a page with the pictures that differ most."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from bench.quality.data import Picture
from bench.quality.metrics import METRICS, Scores, difference

_TEMPLATE = Path(__file__).with_name("page.html")
_WORST, _EDGE = 12, 320  # pictures per setting; pixels of their longer side
_NOTE = (
    "Scores are those of pycocoevalcap; words are split by NLTK's Penn Treebank tokeniser in place "
    "of Stanford's, and differ from published ones by what the two split differently. Intervals: "
    "95 % of 2,000 resamplings of the pictures, of the mean difference a picture to the first row."
)


@dataclass(frozen=True, slots=True)
class Result:
    """A setting's caption for each picture, and their scores."""

    name: str
    captions: Sequence[str]
    scores: Scores


def rows(results: Sequence[Result]) -> list[list[str]]:
    """A header, and a row for each setting."""
    first, *others = results
    head = ["", *METRICS, *(f"{metric} against {first.name}" for metric in METRICS), "captions"]
    found = [head, [first.name, *_wholes(first), *("" for _ in METRICS), ""]]
    for result in others:
        against = []
        for metric in METRICS:
            pair = first.scores.each[metric], result.scores.each[metric]
            mean, low, high = difference(*pair)
            against.append(f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
        pairs = zip(first.captions, result.captions, strict=True)
        same = np.mean([ours == theirs for ours, theirs in pairs])
        found.append([result.name, *_wholes(result), *against, f"{same:.1%} the same"])
    return found


def write(path: Path, title: str, pictures: Sequence[Picture], results: Sequence[Result]) -> None:
    """Write a self-contained HTML page."""
    first, *others = results
    parts = [_table(rows(results)), f"<p class='about'>{_NOTE}</p>"]
    for result in others:
        parts.append(f"<h2>Worst beside {html.escape(first.name)}: {html.escape(result.name)}</h2>")
        lost = first.scores.each["CIDEr"] - result.scores.each["CIDEr"]
        worst = [place for place in np.argsort(-lost)[:_WORST] if lost[place] > 0]
        parts += [_picture(pictures[p], first, result, int(p)) for p in worst]
        if not worst:
            parts.append("<p>No picture is described worse.</p>")
    page = Template(_TEMPLATE.read_text()).substitute(
        title=html.escape(title), body="\n".join(parts)
    )
    path.write_text(page)


def _wholes(result: Result) -> list[str]:
    return [f"{100 * result.scores.whole[metric]:.1f}" for metric in METRICS]


def _table(found: list[list[str]]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    head, *body = found
    lines = "".join(f"<tr>{cells('td', row)}</tr>" for row in body)
    return f"<div class='wide'><table><tr>{cells('th', head)}</tr>{lines}</table></div>"


def _picture(picture: Picture, first: Result, other: Result, place: int) -> str:
    content = io.BytesIO()
    with Image.open(picture.file) as image:
        small = image.convert("RGB")
    small.thumbnail((_EDGE, _EDGE))
    small.save(content, "JPEG", quality=85)
    data = base64.b64encode(content.getvalue()).decode()
    said = "".join(
        f"<dt>{html.escape(each.name)}, CIDEr {100 * each.scores.each['CIDEr'][place]:.0f}</dt>"
        f"<dd>{html.escape(each.captions[place])}</dd>"
        for each in (first, other)
    )
    people = "".join(f"<dd>{html.escape(text)}</dd>" for text in picture.references)
    asked = f"<dt>Asked</dt><dd>{html.escape(picture.prompt)}</dd>" if picture.prompt else ""
    return (
        f"<figure><img alt='{html.escape(picture.file.name)}' "
        f"src='data:image/jpeg;base64,{data}'><dl>{asked}{said}<dt>People</dt>{people}</dl></figure>"
    )
