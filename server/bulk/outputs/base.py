"""The interface of all outputs.

Once `append` has returned, a row survives a kill of the process, and a repeated run finds it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.errors import VignetteError
from server.bulk.inputs.items import Outcome, ResultRow
from server.bulk.outputs.index import Index


class OutputConflict(VignetteError):
    """The output holds something other than our rows, or another run writes to it."""


class NotWritten(VignetteError):
    """One row can't be written where it belongs; other rows can."""


class Output(ABC):
    """Rows of a run, and of earlier runs."""

    @abstractmethod
    def rows(self) -> Iterator[ResultRow]:
        """All rows, in order; one that a killed run left half-written is removed.

        Called once, before anything else. Raises OutputConflict.
        """

    @abstractmethod
    def append(self, row: ResultRow, outcome: Outcome) -> None:
        """Add a row. Raises NotWritten, OSError."""

    @abstractmethod
    def finish(self, index: Index) -> None:
        """Put the output in its final form, with only the last row of each item."""

    @abstractmethod
    def close(self) -> None:
        """Close and unlock the files."""


def latest(rows: Iterable[ResultRow], index: Index) -> Iterator[ResultRow]:
    """The last row of each item. rows: all rows of the output. Raises OutputConflict if some are
    missing.
    """
    count = 0
    for count, row in enumerate(rows, 1):
        if index.latest(row, count - 1):
            yield row
    if count != index.rows:
        raise changed("the output")


def changed(what: Path | str) -> OutputConflict:
    """The error for rows that are no longer where they were written."""
    return OutputConflict(
        f"{what} was removed, moved or changed during the run: rows are missing there; give the "
        "command again"
    )
