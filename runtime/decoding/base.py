"""Base class of all decoding methods: a request's generated texts, one per row of the batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from runtime.decoding.candidates import BeamStep, Move, RowCandidates
from runtime.decoding.penalties import penalises
from runtime.request import Completion, FinishReason, SamplingParams


class Decoding(ABC):
    """Consumes the candidates of each step and provides the token to feed each row next.

    can_burst: the next token depends on a row's logits alone, or on the scores of beams, so that a
    runner can choose it, and steps can run in bursts.
    """

    can_burst = False

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """prompt: token ids. eos: id of the model's end token."""
        self._prompt, self._sampling, self._eos = prompt, sampling, eos
        self._penalises = penalises(sampling)

    @property
    def candidates(self) -> int:
        """Number of likeliest tokens that the next step must return per row.

        A penalty may demote every token of the text, so as many more are needed.
        """
        wanted = max(self._wanted, self._sampling.logprobs)
        if self._penalises:
            wanted += 1 + max(len({*self._prompt, *ids}) for ids in self._generated)
        return wanted

    @property
    @abstractmethod
    def _wanted(self) -> int:
        """`candidates` before penalties and requested log-probabilities."""

    @property
    @abstractmethod
    def _generated(self) -> list[list[int]]:
        """Ids of the generated tokens of each row."""

    @property
    @abstractmethod
    def tokens(self) -> list[int]:
        """The token to feed each row next: the last generated one.

        The row of an ended text is fed its last token again; the result is ignored.
        """

    @property
    @abstractmethod
    def steps_left(self) -> int:
        """Most steps until decoding is over."""

    @property
    @abstractmethod
    def finish_reason(self) -> FinishReason | None:
        """Why the first completion ended, once all texts are complete."""

    @abstractmethod
    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """Choose each row's next token from its candidates; returns the text K/V moves of rows."""

    @abstractmethod
    def extend(
        self, ids: Sequence[int], logprobs: Sequence[float], searched: Sequence[BeamStep]
    ) -> None:
        """Consume a burst of steps, up to the end of the texts.

        ids, logprobs: the likeliest tokens of the first row. searched: those of beams.
        """

    @abstractmethod
    def new_tokens(self, reported: int) -> Completion:
        """Generated tokens of the first completion, after the first `reported`."""

    @abstractmethod
    def completions(self) -> list[Completion]:
        """All completions, best first; valid once there is a finish reason."""
