"""A request's generated texts, each in a row of the batch: what all ways of decoding share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.decoding.candidates import Move, RowCandidates
from runtime.decoding.hypothesis import Hypothesis
from runtime.decoding.penalties import penalises
from runtime.request import Completion, SamplingParams


class Decoding(ABC):
    """Takes the candidates of each step, and says which token each row is fed next.

    plain: it takes the likeliest token of its one row, whatever came before.
    """

    plain = False

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """prompt: token ids. eos: the model's end token."""
        self._prompt, self._sampling, self._eos = prompt, sampling, eos
        self._penalises = penalises(sampling)
        self._texts = [Hypothesis() for _ in range(sampling.rows)]

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens of each row the next step has to tell.

        A penalty may put each token of the text behind those that follow it.
        """
        wanted = max(self._wanted, self._sampling.logprobs)
        if self._penalises:
            wanted += 1 + max(len({*self._prompt, *text.token_ids}) for text in self._texts)
        return wanted

    @property
    @abstractmethod
    def _wanted(self) -> int:
        """The same, without penalties and told log-probabilities."""

    @property
    def tokens(self) -> list[int]:
        """What each row is fed next: the token that was generated last.

        A text that has ended is fed its last token again, to no effect.
        """
        return [text.token_ids[-1] for text in self._texts]

    @property
    def steps_left(self) -> int:
        """Steps until it is over at the latest."""
        return self._sampling.max_new_tokens - max(len(text.token_ids) for text in self._texts)

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether nothing more is generated."""

    @abstractmethod
    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """Take what may come next in each row; returns the rows whose text K/V change places."""

    @abstractmethod
    def news(self, told: int) -> Completion:
        """The tokens of its first completion behind the first `told`."""

    @abstractmethod
    def completions(self) -> list[Completion]:
        """All that was generated, the best first, once it is over."""
