"""Beam search by a runner: which sequences it searches for at once, and what it is told of them."""

from collections import abc
from dataclasses import dataclass

import numpy as np

from runtime.decoding.beams import Beams
from runtime.decoding.candidates import Continuations
from runtime.execution.base import Candidates, Search
from runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Searching:
    """The sequences with beams in a burst, grouped by number of beams and of prompt tokens left."""

    groups: abc.Sequence[abc.Sequence[Sequence]]

    @classmethod
    def among(cls, running: abc.Iterable[Sequence]) -> "Searching":
        """Group the sequences that have beams."""
        groups: dict[tuple[int, int], list[Sequence]] = {}
        for sequence in running:
            if isinstance(sequence.decoding, Beams):
                groups.setdefault((len(sequence.slots), sequence.prompted), []).append(sequence)
        return cls([groups[key] for key in sorted(groups)])

    @property
    def searches(self) -> list[Search]:
        """What the runner takes, a search per group."""
        return [_search(group) for group in self.groups]

    def found(self, of: Candidates) -> dict[int, abc.Sequence[Continuations]]:
        """The steps of each sequence, by the id of its request."""
        return {
            sequence.request.id: steps
            for group, images in zip(self.groups, of.searches, strict=True)
            for sequence, steps in zip(group, images, strict=True)
        }


def _search(group: abc.Sequence[Sequence]) -> Search:
    beams = [s.decoding for s in group if isinstance(s.decoding, Beams)]
    return Search(
        slots=[sequence.slots for sequence in group],
        scores=np.array([each.scores for each in beams], np.float32),
        stops=[each.stop for each in beams],
        wait=group[0].prompted,
        fed=max(sequence.fed for sequence in group),
    )
