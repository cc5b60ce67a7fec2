"""One text while it is generated."""

from dataclasses import dataclass, field

from runtime.decoding.candidates import RowCandidates
from runtime.request import Completion, FinishReason, TopLogprobs


@dataclass(slots=True)
class Hypothesis:
    """Generated tokens, their log-probabilities and, if requested, the likeliest tokens there."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, row: RowCandidates, place: int, top: int) -> None:
        """Append the candidate at index `place` of a row; record the row's `top` likeliest."""
        self.token_ids.append(row.ids[place])
        self.logprobs.append(row.logprobs[place])
        if top:
            self.top_logprobs.append(tuple(zip(row.ids[:top], row.logprobs[:top], strict=True)))

    def completion(self) -> Completion:
        """The current state as a Completion."""
        return Completion(
            tuple(self.token_ids),
            tuple(self.logprobs),
            tuple(self.top_logprobs),
            self.finish_reason,
        )
