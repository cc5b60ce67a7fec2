"""What is to be captioned, and the row that comes of it."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from runtime.request import Caption


class Item(Struct, frozen=True):
    """One image of the input.

    id: unique among the rows of an output. image: its bytes, or the path or URL where they lie.
    name: a path without a suffix, relative to where the input begins; key: of a sample in a
    WebDataset shard, whose other members `members` are, by their extensions. wrong: why there is
    no image.
    """

    id: str
    image: bytes | str = b""
    name: str = ""
    prompt: str | None = None
    key: str | None = None
    members: Mapping[str, bytes] = {}
    wrong: str | None = None


class ScoredCaption(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """One of several captions. score: mean log-probability of its tokens."""

    caption: str
    finish_reason: str
    score: float | None = None


class ResultRow(Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What became of an item: a caption or an error, never both.

    captions: all that were asked for, if that is more than one. settings: what else decides a
    caption: engine, precision, sampling parameters. size, modified: of a local file, in bytes and
    ns, by which it is known again; path: where that is, unless the id says so. sha256: of the
    image, where equal ones are captioned once. text: of the file that the caption is in, where
    there is one for each.
    """

    id: str
    caption: str | None = None
    score: float | None = None
    captions: tuple[ScoredCaption, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    model: str | None = None
    prompt: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    size: int | None = None
    modified: int | None = None
    path: str | None = None
    sha256: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if (self.caption is None) == (self.error is None):
            raise ValueError("a row has either `caption` or `error`")

    @property
    def all_captions(self) -> tuple[ScoredCaption, ...]:
        """All captions, the best first."""
        if self.caption is None:
            return ()
        return self.captions or (ScoredCaption(self.caption, self.finish_reason or "", self.score),)


class Outcome(Struct, frozen=True):
    """What captioning an item came to: captions, the best first, or an error.

    image: its bytes, where they could be read.
    """

    item: Item
    captions: tuple[ScoredCaption, ...] = ()
    error: str | None = None
    image: bytes | None = None
    sha256: str | None = None


def scored(caption: Caption) -> tuple[ScoredCaption, ...]:
    """All captions of a request, the best first."""
    return tuple(
        ScoredCaption(
            each.text, each.finish_reason, None if each.score is None else round(each.score, 5)
        )
        for each in (caption, *caption.others)
    )
