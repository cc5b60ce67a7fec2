"""Items to caption, and the rows written for them."""

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from runtime.errors import VignetteError
from runtime.request import Caption


class UnfitItem(VignetteError):
    """One image can't be captioned."""


class NoWay(VignetteError):
    """No installed package reads input of this kind."""


class Item(Struct, frozen=True):
    """One image of the input.

    id: unique among the rows of an output. image: its bytes, path or URL. name: a path without a
    suffix, relative to the input. key: of a sample in a WebDataset shard; members: its files by
    extension, the image included. wrong: why there is no image.
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
    """The result for an item: a caption or an error, never both.

    captions: all requested captions, if more than one. settings: what else decides a caption:
    engine, precision, sampling parameters. size, modified: of a local file, in bytes and ns, to
    detect changes. path: path or URL of the image, unless it is the id. sha256: of an image that
    the input holds itself, or if equal images are captioned once. text: path of the caption's own
    file, if each caption has one.
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
    """The outcome of captioning an item: captions, the best first, or an error.

    image: its bytes, if they could be read. size, modified: of a local file, before it was read.
    """

    item: Item
    captions: tuple[ScoredCaption, ...] = ()
    error: str | None = None
    image: bytes | None = None
    sha256: str | None = None
    size: int | None = None
    modified: int | None = None


def scored(caption: Caption) -> tuple[ScoredCaption, ...]:
    """All captions of a request, the best first."""
    return tuple(
        ScoredCaption(each.text, each.finish_reason, rounded(each.score))
        for each in (caption, *caption.others)
    )


def rounded(score: float | None) -> float | None:
    """A score as rows have it."""
    return None if score is None else round(score, 5)
