"""Base class of all decoding methods: a request's generated texts, one per row of the batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.decoding.candidates import Move, RowCandidates
from runtime.decoding.hypothesis import Hypothesis
from runtime.decoding.penalties import penalises
from runtime.request import Completion, FinishReason, SamplingParams


class Decoding(ABC):
    """Consumes the candidates of each step and provides the token to feed each row next.

    can_burst: greedy on a single row, independent of earlier tokens, so steps can run in bursts.
    """

    can_burst = False

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """prompt: token ids. eos: id of the model's end token."""
        self._prompt, self._sampling, self._eos = prompt, sampling, eos
        self._penalises = penalises(sampling)
        self._texts = [Hypothesis() for _ in range(sampling.rows)]

    @property
    def candidates(self) -> int:
        """Number of likeliest tokens that the next step must return per row.

        A penalty may demote every token of the text, so as many more are needed.
        """
        wanted = max(self._wanted, self._sampling.logprobs)
        if self._penalises:
            wanted += 1 + max(len({*self._prompt, *text.token_ids}) for text in self._texts)
        return wanted

    @property
    @abstractmethod
    def _wanted(self) -> int:
        """`candidates` before penalties and requested log-probabilities."""

    @property
    def tokens(self) -> list[int]:
        """The token to feed each row next: the last generated one.

        The row of an ended text is fed its last token again; the result is ignored.
        """
        return [text.token_ids[-1] for text in self._texts]

    @property
    def steps_left(self) -> int:
        """Most steps until decoding is over."""
        return self._sampling.max_new_tokens - max([len(text.token_ids) for text in self._texts])

    @property
    @abstractmethod
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended, once all texts are complete."""

    @abstractmethod
    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """Choose each row's next token from its candidates; returns the text K/V moves of rows."""

    def extend(self, ids: list[int], logprobs: list[float]) -> None:
        """Append the likeliest tokens of a burst of steps, up to the end of the text."""
        raise NotImplementedError(f"{type(self).__name__} chooses its tokens itself")

    @abstractmethod
    def new_tokens(self, reported: int) -> Completion:
        """Generated tokens of the first completion, after the first `reported`."""

    @abstractmethod
    def completions(self) -> list[Completion]:
        """All completions, best first; valid once there is a finish reason."""
