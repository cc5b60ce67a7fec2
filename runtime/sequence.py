"""A request on its way through the engine."""

from dataclasses import dataclass, field

from runtime.model.manifest import NOT_A_TOKEN
from runtime.request import FinishReason, GenerationRequest, RequestOutput, Timing


@dataclass(slots=True, eq=False)
class Sequence:
    """A request: waiting (no slot), running (a slot), or finished (a reason).

    `fed` counts the text tokens whose keys and values are in the cache, `told` the generated ones
    that an output has told of. Times are `time.perf_counter()` seconds.
    """

    request: GenerationRequest
    arrived: float
    generated: list[int] = field(default_factory=list)
    slot: int | None = None
    fed: int = 0
    told: int = 0
    finish_reason: FinishReason | None = None
    admitted: float | None = None
    encoded: float | None = None
    finished: float | None = None

    def tokens(self, steps: int) -> list[int]:
        """What to feed at the next decode steps: forced tokens, or first the last one generated.

        NOT_A_TOKEN stands for what the step before will predict.
        """
        prompt = self.request.prompt_ids
        known = list(prompt[self.fed : self.fed + steps]) or [self.generated[-1]]
        return known + [NOT_A_TOKEN] * (steps - len(known))

    @property
    def most_left(self) -> int:
        """Decode steps until it is over at the latest."""
        forced = max(0, len(self.request.prompt_ids) - self.fed - 1)  # behind the next one
        return forced + self.request.sampling.max_new_tokens - len(self.generated)

    def advance(self, predicted: int, eos: int) -> None:
        """Take what was predicted after the next token; ends the sequence when it is over."""
        self.fed += 1
        if predicted == NOT_A_TOKEN:
            self.finish_reason = FinishReason.FAILED
            return
        if self.fed < len(self.request.prompt_ids):
            return  # the next token is forced, whatever was predicted
        self.generated.append(predicted)
        sampling = self.request.sampling
        if predicted == eos and not sampling.ignore_eos:
            self.finish_reason = FinishReason.STOP
        elif len(self.generated) >= sampling.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH

    def output(self) -> RequestOutput | None:
        """News since the last call, if there are any that are wanted by now."""
        ended = self.finish_reason is not None
        if not ended and (not self.request.stream or self.told == len(self.generated)):
            return None
        new, self.told = tuple(self.generated[self.told :]), len(self.generated)
        return RequestOutput(self.request.id, new, self.finish_reason, self._timing())

    def _timing(self) -> Timing | None:
        if self.finished is None:
            return None
        admitted = self.finished if self.admitted is None else self.admitted
        encoded = self.finished if self.encoded is None else self.encoded
        return Timing(admitted - self.arrived, encoded - admitted, self.finished - encoded)
