"""A request on its way through the engine."""

import math
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.decoding.candidates import Move, RowCandidates
from runtime.model.manifest import UNFORCED
from runtime.request import Completion, FinishReason, GenerationRequest, RequestOutput, Timing

if TYPE_CHECKING:  # it takes NumPy
    from runtime.decoding.base import Decoding


@dataclass(slots=True, eq=False)
class Sequence:
    """A request: waiting (no slots), running (a slot for each of its rows), or finished (a reason).

    `fed` counts the text tokens whose keys and values are in the cache of each row, `told` the
    generated ones that an output has told of. Times are `time.perf_counter()` seconds.
    """

    request: GenerationRequest
    decoding: "Decoding"
    arrived: float
    slots: list[int] = field(default_factory=list)
    fed: int = 0
    told: int = 0
    finish_reason: FinishReason | None = None
    admitted: float | None = None
    encoded: float | None = None
    finished: float | None = None

    def tokens(self, steps: int) -> list[list[int]]:
        """What to feed each row at the next decode steps: forced tokens, or first the last one that
        was generated. UNFORCED stands for what the step before will find likeliest.
        """
        prompt = self.request.prompt_ids
        forced = [[token] * len(self.slots) for token in prompt[self.fed : self.fed + steps]]
        known = forced or [self.decoding.tokens]
        return known + [[UNFORCED] * len(self.slots)] * (steps - len(known))

    @property
    def candidates(self) -> int:
        """How many of the likeliest tokens the next step has to tell of each row."""
        generates = self.fed + 1 >= len(self.request.prompt_ids)
        return self.decoding.candidates if generates else 1

    @property
    def most_left(self) -> int:
        """Decode steps that need nothing from the host, and it is over at the latest."""
        if not self.decoding.plain:
            return 1
        forced = max(0, len(self.request.prompt_ids) - self.fed - 1)  # behind the next one
        return forced + self.decoding.steps_left

    def advance(self, rows: ListLike[RowCandidates]) -> list[Move]:
        """Take what may follow the next tokens; returns slots whose text K/V go to others."""
        self.fed += 1
        if any(math.isnan(row.logprobs[0]) for row in rows):
            self.finish_reason = FinishReason.FAILED
            return []
        if self.fed < len(self.request.prompt_ids):
            return []  # the next token is forced, whatever was found
        moves = self.decoding.advance(rows)
        if self.decoding.over:
            self.finish_reason = self.decoding.completions()[0].finish_reason
            return []
        return [(self.slots[source], self.slots[target]) for source, target in moves]

    def output(self) -> RequestOutput | None:
        """News since the last call, if there are any that are wanted by now."""
        if self.finish_reason is None:
            news = self.decoding.news(self.told) if self.request.stream else Completion(())
            self.told += len(news.token_ids)
            return RequestOutput(self.request.id, news) if news.token_ids else None
        if not self.decoding.over:  # cancelled, expired or failed
            failed = Completion((), finish_reason=self.finish_reason)
            return RequestOutput(self.request.id, failed, self._timing())
        news, others = self.decoding.news(self.told), tuple(self.decoding.completions()[1:])
        return RequestOutput(self.request.id, news, self._timing(), others)

    def _timing(self) -> Timing | None:
        if self.finished is None:
            return None
        admitted = self.finished if self.admitted is None else self.admitted
        encoded = self.finished if self.encoded is None else self.encoded
        return Timing(admitted - self.arrived, encoded - admitted, self.finished - encoded)
