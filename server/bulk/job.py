"""A run of `vignette caption`: what is left of the input, captioned into the output."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from runtime.request import FinishReason
from server.bulk.captioning import same
from server.bulk.fetching import is_url
from server.bulk.index import Index, Kept
from server.bulk.items import Item, Outcome, Row
from server.bulk.output import NotWritten, Output, OutputConflict


@dataclass(frozen=True, slots=True)
class About:
    """What decides all captions of a run. settings: engine, precision, sampling parameters.

    varied: items have prompts of their own.
    """

    model: str
    settings: dict[str, Any]
    prompt: str | None = None
    varied: bool = False


@dataclass(slots=True)
class Told:
    """How many items there were. before: of an earlier run; cut: of the captioned."""

    captioned: int = 0
    cut: int = 0
    failed: int = 0
    before: int = 0

    @property
    def ended(self) -> int:
        """Of this run."""
        return self.captioned + self.failed


@dataclass(slots=True)
class Job:
    """Items that have no row yet get one each.

    again: captions that were made otherwise, or of a file that has changed since, are made anew.
    retry: so are errors. kept: what is known of images that may come again.
    """

    output: Output
    about: About
    again: bool = False
    retry: bool = False
    index: Index = field(default_factory=Index)
    kept: Kept = field(default_factory=Kept)
    told: Told = field(default_factory=Told)

    def read(self) -> None:
        """Find out what the output has. Raises OutputConflict for captions of other settings."""
        for row in self.output.rows():
            other = self._difference(row)
            if other and not self.again:
                raise OutputConflict(
                    f"{row.id} was captioned with another {other}: name another output, or caption "
                    "such images anew with --again"
                )
            self.index.add(row, not other and not (self.retry and row.error is not None))
            if row.sha256 is not None and row.said and not other:
                self.kept.keep(same(row.sha256, row.prompt), msgspec.msgpack.encode(row.said))

    def left(self, items: Iterable[Item]) -> Iterator[Item]:
        """Those that have no row yet; from now on they count as if they had."""
        for item in items:
            if self.index.claim(item.id):
                yield item
            else:
                self.told.before += 1

    def write(self, outcomes: Iterable[Outcome], tell: Callable[[Told], object]) -> Told:
        """A row for each, then the output's final form; tell is called after each.

        Raises OSError when none can be written, and what ended the run.
        """
        for outcome in outcomes:
            row = self._write(outcome)
            self.told.failed += row.error is not None
            self.told.captioned += row.error is None
            self.told.cut += row.finish_reason == FinishReason.LENGTH
            tell(self.told)
        self.output.finish(self.index)
        return self.told

    def once(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Without those of items that have a row, which may come again from elsewhere."""
        return (outcome for outcome in outcomes if self.index.claim(outcome.item.id))

    def _write(self, outcome: Outcome) -> Row:
        row = self._row(outcome)
        try:
            self.output.append(row, outcome)
        except NotWritten as error:
            row = Row(row.id, error=str(error), model=row.model, settings=row.settings)
            self.output.append(row, outcome)
        self.index.add(row, True)
        return row

    def _row(self, outcome: Outcome) -> Row:
        item, about = outcome.item, self.about
        size, modified = _state(item.image)
        common = Row(
            item.id,
            error=outcome.error,
            model=about.model,
            prompt=item.prompt or about.prompt,
            settings=about.settings,
            size=size,
            modified=modified,
            sha256=outcome.sha256,
        )
        if not outcome.said:
            return common
        best = outcome.said[0]
        return msgspec.structs.replace(
            common,
            caption=best.caption,
            score=best.score,
            finish_reason=best.finish_reason,
            captions=outcome.said if len(outcome.said) > 1 else (),
        )

    def _difference(self, row: Row) -> str | None:
        """What about a caption is not as it would be made now, or None."""
        if row.caption is None:
            return None
        if row.model != self.about.model:
            return "model"
        if row.prompt != self.about.prompt and not self.about.varied:
            return "prompt"
        for name in sorted(row.settings.keys() | self.about.settings.keys()):
            if row.settings.get(name) != self.about.settings.get(name):
                return name
        if row.size is not None and _state(row.id) not in ((row.size, row.modified), _GONE):
            return "content"
        return None


_GONE = None, None


def _state(image: bytes | str) -> tuple[int | None, int | None]:
    """Size and time of change of a local file, by which it is known again."""
    if isinstance(image, bytes) or is_url(image):
        return _GONE
    try:
        found = Path(image).stat()
    except (OSError, ValueError):  # no name of a file, too
        return _GONE
    return found.st_size, found.st_mtime_ns
