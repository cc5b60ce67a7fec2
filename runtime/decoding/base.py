"""What a sequence needs of a way of decoding."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from runtime.request import Completion

Move = tuple[int, int]  # a row whose text K/V another row takes over, and that one


class RowCandidates(NamedTuple):
    """The likeliest tokens of one row, best first; best_logit is that of the first of them."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    best_logit: float


class Decoding(Protocol):
    """A request's text as it grows, in one row of the batch or several."""

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of its one row, whatever came before."""

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens of each row it needs at the next step."""

    @property
    def tokens(self) -> list[int]:
        """What each row is fed next: the token that was generated last."""

    @property
    def steps_left(self) -> int:
        """Steps until it is over at the latest."""

    @property
    def over(self) -> bool:
        """Whether nothing more is generated."""

    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """Take what may come next in each row; returns the rows whose text K/V change places."""

    def news(self, told: int) -> Completion:
        """The tokens of its first completion behind the first `told`."""

    def completions(self) -> list[Completion]:
        """All that was generated, the best first, once it is over."""
