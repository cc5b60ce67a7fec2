"""A run of `vignette caption`: captions the rest of the input into the output."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import structs

from runtime.request import FinishReason
from server.bulk.captioners.captioning import same
from server.bulk.inputs.folders import restored
from server.bulk.inputs.items import Item, Outcome, ResultRow
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.keys import location, of_item, state
from server.bulk.outputs.base import NotWritten, Output, OutputConflict
from server.bulk.outputs.index import Index

_FAILED = (FinishReason.FAILED, FinishReason.ERROR)  # which earlier versions wrote as captions


@dataclass(frozen=True, slots=True)
class CaptionSettings:
    """What decides all captions of a run. settings: engine, precision, sampling parameters.

    varied: items have prompts of their own.
    """

    model: str
    settings: dict[str, Any]
    prompt: str | None = None
    varied: bool = False


@dataclass(slots=True)
class Counts:
    """Numbers of items. before: done by earlier runs; cut: captions cut off at the limit.

    failed_before: errors of earlier runs in the output, whether or not of this input.
    """

    captioned: int = 0
    cut: int = 0
    failed: int = 0
    before: int = 0
    failed_before: int = 0

    @property
    def ended(self) -> int:
        """Items that this run has written rows for."""
        return self.captioned + self.failed


@dataclass(slots=True)
class BulkRun:
    """Writes a row for each item that has none yet.

    again: caption anew what has captions of other settings, of a file that has changed since, or
    of another image or prompt.
    retry: caption failed items anew. kept: captions for equal images that may come again.
    """

    output: Output
    made_with: CaptionSettings
    again: bool = False
    retry: bool = False
    index: Index = field(default_factory=Index)
    kept: Kept = field(default_factory=Kept)
    counts: Counts = field(default_factory=Counts)

    def read(self) -> None:
        """Read the output's rows. Raises OutputConflict for captions of other settings."""
        for row in self.output.rows():
            other = self._difference(row)
            failed = row.finish_reason in _FAILED
            if other and not self.again:
                raise OutputConflict(
                    f"{row.id} was captioned with another {other}: name another output, or caption "
                    "such images anew with --again"
                )
            again = failed or (self.retry and row.error is not None)
            self.index.add(row, not other and not again)
            if row.sha256 is not None and row.all_captions and not other and not failed:
                self.kept.keep(
                    same(row.sha256, row.prompt), msgspec.msgpack.encode(row.all_captions)
                )

    def left(self, items: Iterable[Item]) -> Iterator[Item]:
        """Items that have no row yet; each is marked as done when it is taken. Raises SameId."""
        for item in items:
            if self.index.claim(item.id, of_item(item), self.again):
                yield item
            else:
                self.counts.before += 1

    def write(self, outcomes: Iterable[Outcome], tell: Callable[[Counts], object]) -> Counts:
        """Write a row for each outcome, calling `tell` after each, then finish the output.

        Raises OSError if rows can't be written, and the error that ended the run.
        """
        for outcome in outcomes:
            row = self._write(outcome)
            self.counts.failed += row.error is not None
            self.counts.captioned += row.error is None
            self.counts.cut += row.finish_reason == FinishReason.LENGTH
            tell(self.counts)
        self.counts.failed_before = self.index.failed - self.counts.failed
        self.output.finish(self.index)
        return self.counts

    def once(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Outcomes without repeats: a cluster may send an item's outcome twice. Raises SameId."""
        for outcome in outcomes:
            asked = of_item(outcome.item, outcome.sha256)
            if self.index.claim(outcome.item.id, asked, self.again):
                yield outcome

    def _write(self, outcome: Outcome) -> ResultRow:
        row = self._row(outcome)
        try:
            self.output.append(row, outcome)
        except NotWritten as error:
            row = structs.replace(
                row, error=str(error), caption=None, score=None, captions=(), finish_reason=None
            )
            self.output.append(row, outcome)
        self.index.add(row, True)
        return row

    def _row(self, outcome: Outcome) -> ResultRow:
        item, made_with = outcome.item, self.made_with
        path = location(item) if isinstance(item.image, str) else None
        best = outcome.captions[0] if outcome.captions else None
        return ResultRow(
            item.id,
            caption=best.caption if best else None,
            score=best.score if best else None,
            captions=outcome.captions if len(outcome.captions) > 1 else (),
            finish_reason=best.finish_reason if best else None,
            error=outcome.error,
            model=made_with.model,
            prompt=item.prompt,
            settings=made_with.settings,
            size=outcome.size,
            modified=outcome.modified,
            path=None if path == item.id else path,
            sha256=outcome.sha256,
        )

    def _difference(self, row: ResultRow) -> str | None:
        """Name of what differs between a row's caption and one made now, or None."""
        if row.caption is None:
            return None
        if row.model != self.made_with.model:
            return "model"
        if row.prompt != self.made_with.prompt and not self.made_with.varied:
            return "prompt"
        for name in sorted(row.settings.keys() | self.made_with.settings.keys()):
            if row.settings.get(name) != self.made_with.settings.get(name):
                return name
        there = state(restored(row.path or row.id))
        if row.size is not None and there not in ((row.size, row.modified), (None, None)):
            return "content"
        return None
