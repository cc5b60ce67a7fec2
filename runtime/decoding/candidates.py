"""What a decode step finds for a row of the batch."""

from collections.abc import Sequence
from typing import NamedTuple

Move = tuple[int, int]  # (source, target): rows, of which the target takes over the text K/V


class RowCandidates(NamedTuple):
    """The likeliest tokens of one row, best first; best_logit is that of the first of them."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    best_logit: float
