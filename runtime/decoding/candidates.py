"""Result of a decode step for one row of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

Move = tuple[int, int]  # (source, target) rows: copy text K/V from source to target


class RowCandidates(NamedTuple):
    """The likeliest tokens of one row, best first; best_logit is the logit of the first."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    best_logit: float
