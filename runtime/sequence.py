"""A request and its state inside the engine."""

import math
from collections import abc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.decoding.candidates import BeamStep, Move, RowCandidates
from runtime.request import Completion, FinishReason, GenerationRequest, RequestOutput, Timing

if TYPE_CHECKING:  # imports NumPy
    from runtime.decoding.base import Decoding


@dataclass(slots=True, eq=False)
class Sequence:
    """A request: waiting (no slots), running (one slot per row), or finished (has a reason).

    `fed` counts the text tokens in each row's K/V cache, `reported` the generated tokens already
    reported in outputs. Times are `time.perf_counter()` seconds.
    """

    request: GenerationRequest
    decoding: "Decoding"
    arrived: float
    slots: list[int] = field(default_factory=list)
    fed: int = 0
    reported: int = 0
    finish_reason: FinishReason | None = None
    admitted: float | None = None
    encoded: float | None = None
    finished: float | None = None

    def tokens(self, steps: int) -> list[list[int]]:
        """Tokens to feed each row at the next decode steps, as far as they are known: the remaining
        prompt, or else the last generated token.
        """
        prompt = self.request.prompt_ids
        if self.fed >= len(prompt):
            return [self.decoding.tokens]
        return [[token] * len(self.slots) for token in prompt[self.fed : self.fed + steps]]

    @property
    def candidates(self) -> int:
        """Number of candidates that the next step must return per row."""
        generates = self.fed + 1 >= len(self.request.prompt_ids)
        return self.decoding.candidates if generates else 1

    @property
    def prompted(self) -> int:
        """Tokens of the prompt to feed after the next one."""
        return max(0, len(self.request.prompt_ids) - self.fed - 1)

    @property
    def max_burst(self) -> int:
        """Decode steps up to the latest possible end of a sequence that can burst."""
        return self.prompted + self.decoding.steps_left

    def advance(self, rows: abc.Sequence[RowCandidates]) -> list[Move]:
        """Consume a step's candidates; returns (source, target) slots of text K/V to copy."""
        self.fed += 1
        if any(math.isnan(row.logprobs[0]) for row in rows):
            self.finish_reason = FinishReason.FAILED
            return []
        if self.fed < len(self.request.prompt_ids):
            return []  # the next token comes from the prompt
        moves = self.decoding.advance(rows)
        self.finish_reason = self.decoding.finish_reason
        if self.finish_reason is not None:
            return []
        return [(self.slots[source], self.slots[target]) for source, target in moves]

    def extend(
        self,
        rows: abc.Sequence[tuple[list[int], list[float]]],
        searched: abc.Sequence[BeamStep] = (),
    ) -> None:
        """Consume a burst of steps, up to the end of the sequence.

        rows: each row's likeliest tokens and their log-probabilities. searched: with beams, their
        continuations, from the end of the prompt on.
        """
        ids, logprobs = rows[0]
        prompted, steps = self.prompted, len(ids)
        sums = map(sum, zip(*(of_row for _, of_row in rows), strict=True))
        whole = next((step for step, value in enumerate(sums) if math.isnan(value)), steps)
        self.fed += steps
        self.decoding.extend(
            ids[prompted:whole], logprobs[prompted:whole], searched[: max(0, whole - prompted)]
        )
        self.finish_reason = self.decoding.finish_reason
        if self.finish_reason is None and whole < steps:
            self.finish_reason = FinishReason.FAILED

    def output(self) -> RequestOutput | None:
        """Output since the last call: new tokens if streaming, everything at the end; else None."""
        if self.finish_reason is None:
            if not self.request.stream:
                return None
            new = self.decoding.new_tokens(self.reported)
            self.reported += len(new.token_ids)
            return RequestOutput(self.request.id, new) if new.token_ids else None
        if self.decoding.finish_reason is None:  # cancelled, expired or failed
            failed = Completion((), finish_reason=self.finish_reason)
            return RequestOutput(self.request.id, failed, self._timing())
        new, others = self.decoding.new_tokens(self.reported), self.decoding.completions()[1:]
        return RequestOutput(self.request.id, new, self._timing(), tuple(others))

    def _timing(self) -> Timing | None:
        if self.finished is None:
            return None
        admitted = self.finished if self.admitted is None else self.admitted
        encoded = self.finished if self.encoded is None else self.encoded
        return Timing(admitted - self.arrived, encoded - admitted, self.finished - encoded)
