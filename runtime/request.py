"""What callers ask for, how far it has come, and what they get."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.model.manifest import NOT_A_TOKEN


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # the model said its end token
    LENGTH = "length"  # max_new_tokens were generated
    CANCELLED = "cancelled"  # the caller took it back
    EXPIRED = "expired"  # its deadline passed while it waited; it was never run
    FAILED = "failed"  # the model's numbers broke down (NaN), of this row alone


@dataclass(frozen=True, slots=True)
class Terms:
    """When a request may be admitted; times are `time.perf_counter()` seconds.

    submitted_at: when it began to wait, if that was before it came here.
    urgent: before those that are not.
    deadline: after which it is not worth starting; None waits for good.
    """

    submitted_at: float | None = None
    urgent: bool = True
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One image (or clip) to caption.

    pixels: what the encoder graph takes for one row, as `preprocess` makes it; the scheduler never
        looks at it.
    prompt_ids: forced first tokens, the start token included; at least one.
    max_new_tokens: most tokens to generate, the end token included.
    ignore_eos: generate all max_new_tokens whatever the model says; for measuring speed.
    terms: when it may be admitted.
    """

    pixels: Any
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    ignore_eos: bool = False
    terms: Terms = Terms()


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: waiting (no slot), running (a slot), or finished (a reason).

    `fed` counts the text tokens whose keys and values are in the cache. Times are
    `time.perf_counter()` seconds.
    """

    request: Request
    submitted_at: float
    generated: list[int] = field(default_factory=list)
    slot: int | None = None
    fed: int = 0
    finish_reason: FinishReason | None = None
    admitted_at: float | None = None
    encoded_at: float | None = None
    finished_at: float | None = None

    @property
    def expired(self) -> bool:
        """Whether it waited in vain."""
        return self.finish_reason is FinishReason.EXPIRED

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
        return forced + self.request.max_new_tokens - len(self.generated)

    def advance(self, predicted: int, eos: int) -> None:
        """Take what was predicted after the next token; ends the sequence when it is over."""
        self.fed += 1
        if predicted == NOT_A_TOKEN:
            self.finish_reason = FinishReason.FAILED
            return
        if self.fed < len(self.request.prompt_ids):
            return  # the next token is forced, whatever was predicted
        self.generated.append(predicted)
        if predicted == eos and not self.request.ignore_eos:
            self.finish_reason = FinishReason.STOP
        elif len(self.generated) >= self.request.max_new_tokens:
            self.finish_reason = FinishReason.LENGTH


@dataclass(frozen=True, slots=True)
class Caption:
    """What a request got. Token counts leave the start and end tokens out; times in seconds."""

    text: str
    token_ids: tuple[int, ...]  # as generated, the end token included
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    encode_s: float
    decode_s: float
