"""Beam search by a runner: which sequences it searches for at once, and what it is told of them."""

from collections import abc

import numpy as np

from runtime.decoding.beams import Beams
from runtime.decoding.candidates import BeamStep
from runtime.execution.base import Candidates, Search
from runtime.sequence import Sequence

Groups = abc.Sequence[abc.Sequence[Sequence]]


def grouped(running: abc.Iterable[Sequence]) -> Groups:
    """The sequences with beams, grouped by number of beams and of prompt tokens left."""
    groups: dict[tuple[int, int], list[Sequence]] = {}
    for sequence in running:
        if isinstance(sequence.decoding, Beams):
            groups.setdefault((len(sequence.slots), sequence.prompted), []).append(sequence)
    return [groups[key] for key in sorted(groups)]


def search_of(group: abc.Sequence[Sequence]) -> Search:
    """What a runner takes to search for a group."""
    beams = [s.decoding for s in group if isinstance(s.decoding, Beams)]
    return Search(
        slots=[sequence.slots for sequence in group],
        scores=np.array([each.scores for each in beams], np.float32),
        stops=[each.stop for each in beams],
        forced=group[0].prompted,
        fed=max(sequence.fed for sequence in group),
    )


def steps_of(groups: Groups, found: Candidates) -> dict[int, abc.Sequence[BeamStep]]:
    """The steps of each sequence, by the id of its request."""
    return {
        sequence.request.id: steps
        for group, images in zip(groups, found.searches, strict=True)
        for sequence, steps in zip(group, images, strict=True)
    }
