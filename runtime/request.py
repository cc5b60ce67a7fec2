"""What callers ask for and what they get, as it travels between threads and processes.

A `GenerationRequest` is made once, where it is parsed, and carried whole. Times are
`time.perf_counter()` seconds, which all processes of a machine share.
"""

import itertools
import secrets
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Any, Protocol

from msgspec import Struct, field

from runtime.errors import ComputationFailed

_ids = itertools.count(secrets.randbits(30) << 32)  # no other process of a run counts from there


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # the model said its end token
    LENGTH = "length"  # max_new_tokens were generated
    CANCELLED = "cancelled"  # the caller took it back
    EXPIRED = "expired"  # its deadline passed while it waited; it was never run
    FAILED = "failed"  # the model's numbers broke down (NaN), of this row alone


class Priority(StrEnum):
    """Who is admitted first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class SamplingParams(Struct, frozen=True):
    """What to generate.

    max_new_tokens: most tokens to generate, the end token included.
    ignore_eos: generate all of them whatever the model says; for measuring speed.
    """

    max_new_tokens: int
    ignore_eos: bool = False


class SchedulingParams(Struct, frozen=True):
    """When a request may be admitted.

    arrival_time: when it began to wait, if that was before it came to the engine.
    deadline: after which it is not worth starting; None waits for good.
    """

    arrival_time: float | None = None
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None


class GenerationRequest(Struct, frozen=True):
    """One image (or clip) to caption.

    pixels: what the encoder graph takes for one row, as `preprocess` makes it; between processes
        the slot of shared memory that holds it. The scheduler never looks at it.
    prompt_ids: forced first tokens, the start token included; at least one.
    stream: tell of new tokens after every step; else of all of them at the end.
    id: unique among all processes of a run.
    """

    pixels: Any
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    scheduling: SchedulingParams = SchedulingParams()
    stream: bool = False
    id: int = field(default_factory=lambda: next(_ids))


class Timing(Struct, frozen=True):
    """Where a request's seconds went; what it never reached took none.

    queue_s: without a slot. encode_s: until its image K/V were there. decode_s: its decode steps,
    and what came between them. preprocess_s: of its image, before it came to the engine.
    """

    queue_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From its arrival to its end."""
        return self.queue_s + self.encode_s + self.decode_s


class RequestOutput(Struct, frozen=True):
    """News of a request: tokens since the last of its outputs; at the end also why, and when."""

    id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    timing: Timing | None = None


class Caption(Struct, frozen=True):
    """What a request got. Token counts leave the start and end tokens out."""

    text: str
    token_ids: tuple[int, ...]  # as generated, the end token included
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: Timing


def joined(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """The outputs of a request that has ended as one. Raises ComputationFailed if it FAILED."""
    tokens: list[int] = []
    for output in outputs:
        tokens += output.token_ids
    if output.finish_reason is FinishReason.FAILED:
        raise ComputationFailed(
            "the model's numbers broke down (NaN) on this image: caption it with an engine of "
            "another precision, such as fp32"
        )
    return RequestOutput(output.id, tuple(tokens), output.finish_reason, output.timing)


class Texts(Protocol):
    """The part of a tokenizer that writes captions."""

    def text(self, ids: Sequence[int]) -> str:
        """Of generated tokens, special ones left out."""


def captioned(request: GenerationRequest, output: RequestOutput, tokenizer: Texts) -> Caption:
    """The caption in all that was generated for a request."""
    reason, timing = output.finish_reason, output.timing
    assert reason is not None and timing is not None
    return Caption(
        text=tokenizer.text(output.token_ids),
        token_ids=output.token_ids,
        finish_reason=reason,
        prompt_tokens=len(request.prompt_ids) - 1,
        completion_tokens=len(output.token_ids) - (reason is FinishReason.STOP),
        timing=timing,
    )
