"""What the steps of a burst have found, copied to the host behind them."""

from collections.abc import Sequence

import numpy as np

from runtime.execution.base import Candidates
from runtime.execution.beam_search import BeamSearch, Group
from runtime.execution.device_buffer import pinned
from runtime.execution.rings import Rings
from runtime.execution.stream import Stream


class BurstResults:
    """Host memory for the results of one burst, which is queued or has run."""

    def __init__(self, stream: Stream, rings: Rings, search: BeamSearch) -> None:
        self._stream, self._ended = stream, stream.mark()
        self.rows = self.steps = 0
        self.groups: Sequence[Group] = ()
        self.tokens, self._logprobs = (
            pinned(stream.device, rings.shape, ring.dtype)
            for ring in (rings.tokens, rings.logprobs)
        )
        self._best = {
            name: pinned(stream.device, search.shape, buffer.dtype)
            for name, buffer in search.best.items()
        }
        self._copies = [(rings.tokens, self.tokens), (rings.logprobs, self._logprobs)]
        self._search_copies = [(search.best[name], array) for name, array in self._best.items()]

    def fetch(self, rows: int, steps: int, groups: Sequence[Group]) -> None:
        """Queue the copies of what the burst finds."""
        self.rows, self.steps, self.groups = rows, steps, groups
        for buffer, array in self._copies + (self._search_copies if groups else []):
            buffer.download(array, self._stream)
        self._ended.set()

    def wait(self, bucket: int) -> tuple[Candidates, list[int]]:
        """Wait for the end of the burst; returns its results, and the rows of its bucket whose
        numbers broke down.

        Padding rows are among these, whose slots a sequence may have left before its first step.
        """
        self._ended.wait()
        chosen = slice(1, self.steps + 1)
        logprobs, tokens = (ring[chosen, :, None].copy() for ring in (self._logprobs, self.tokens))
        failed = np.isnan(logprobs[:, :bucket]).any(axis=(0, 2))
        searches = [group.results(self._best, self.steps) for group in self.groups]
        rows = slice(self.rows)
        found = Candidates(tokens[:, rows], logprobs[:, rows], searches=searches)
        return found, np.flatnonzero(failed).tolist()
