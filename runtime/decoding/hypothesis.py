"""One text as it grows, token by token."""

from dataclasses import dataclass, field

from runtime.decoding.candidates import RowCandidates
from runtime.request import Completion, FinishReason, TopLogprobs


@dataclass(slots=True)
class Hypothesis:
    """Generated tokens, their log-probabilities and, where asked for, the likeliest beside them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, row: RowCandidates, place: int, top: int) -> None:
        """Go on with the candidate at that place of a row; note the `top` likeliest."""
        self.token_ids.append(row.ids[place])
        self.logprobs.append(row.logprobs[place])
        if top:
            self.top_logprobs.append(tuple(zip(row.ids[:top], row.logprobs[:top], strict=True)))

    def copy(self) -> "Hypothesis":
        """Another text with the same beginning."""
        return Hypothesis([*self.token_ids], [*self.logprobs], [*self.top_logprobs])

    def completion(self) -> Completion:
        """As it is now."""
        return Completion(
            tuple(self.token_ids),
            tuple(self.logprobs),
            tuple(self.top_logprobs),
            self.finish_reason,
        )
