"""What a decode step found for a row of the batch, or for an image with beams."""

from collections.abc import Sequence
from typing import NamedTuple

Move = tuple[int, int]  # (source, target) rows: copy text K/V from source to target


class RowCandidates(NamedTuple):
    """The likeliest tokens of one row, best first; best_logit is the logit of the first."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    best_logit: float


class BeamStep(NamedTuple):
    """A step of beam search: the best `2 * num_beams` ways to continue an image's beams by one
    token, best first.

    parents: the row of each one's beam. logprobs: of `ids`. scores: sums of a text's
    log-probabilities, float32 values. kept: the indices of the `num_beams` that go on.
    """

    ids: list[int]
    parents: list[int]
    logprobs: list[float]
    scores: list[float]
    kept: list[int]
