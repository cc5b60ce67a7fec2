"""Requests and outputs, as passed between threads and processes.

A `GenerationRequest` is built once, where it is parsed, and passed on whole. Times are
`time.perf_counter()` seconds, a clock that all processes of a machine share.
"""

import itertools
import secrets
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta, Struct, field

_ids = itertools.count(secrets.randbits(30) << 32)  # unique among the processes of a run


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # the model generated its end token
    LENGTH = "length"  # max_new_tokens were generated
    CANCELLED = "cancelled"  # the caller cancelled the request
    EXPIRED = "expired"  # the deadline passed while the request waited; it was never run
    FAILED = "failed"  # NaN in one of the request's rows; other requests are not affected
    ERROR = "error"  # an internal error; the log has it


class Priority(StrEnum):
    """Order of admission: interactive before batch."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class SamplingParams(Struct, frozen=True):
    """Sampling parameters; the defaults decode greedily. Names and meanings are those of Hugging
    Face's `generate`.

    max_new_tokens: most tokens to generate, including the end token.
    min_new_tokens: tokens to generate before the end token is allowed.
    ignore_eos: go on past the end token, to `max_new_tokens`; for measuring speed.
    n: captions to return (`num_return_sequences`); more than 1 needs beams or a temperature.
    logprobs: number of likeliest tokens per position whose log-probabilities are returned.
    num_beams: beams searched; the best `n` are returned.
    length_penalty, early_stopping: how beams are ranked, and when the search ends (True, False
        or "never").
    no_repeat_ngram_size: n-grams of this size may occur only once; 0 allows all.
    repetition_penalty: divides the positive scores of earlier tokens, multiplies negative ones.
    temperature: 0 takes the likeliest token; above 0, a token is drawn.
    top_k, top_p: draw from the `top_k` likeliest tokens, cut to the fewest that reach `top_p`.
    seed: equal seeds draw equal tokens.
    """

    max_new_tokens: int
    ignore_eos: bool = False
    n: Annotated[int, Meta(ge=1, le=8)] = 1
    logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    num_beams: Annotated[int, Meta(ge=1, le=8)] = 1
    length_penalty: Annotated[float, Meta(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False
    no_repeat_ngram_size: Annotated[int, Meta(ge=0, le=1024)] = 0
    repetition_penalty: Annotated[float, Meta(ge=1, le=100)] = 1.0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=1, le=64)] = 50
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    min_new_tokens: Annotated[int, Meta(ge=0, le=1024)] = 0

    @property
    def rows(self) -> int:
        """Rows of the decode batch, one slot each, that the request takes."""
        return max(self.num_beams, self.n)


def _ranges() -> Iterator[tuple[str, tuple[float, float]]]:
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items():
        for meta in getattr(hint, "__metadata__", ()):
            yield name, (meta.ge, meta.le)


RANGES = dict(_ranges())  # inclusive minimum and maximum of sampling parameters


class SchedulingParams(Struct, frozen=True):
    """When a request may be admitted.

    arrival_time: when the request began to wait, if before it reached the engine.
    deadline: a request not admitted by then expires; None waits without limit.
    """

    arrival_time: float | None = None
    priority: Priority = Priority.INTERACTIVE
    deadline: float | None = None


class GenerationRequest(Struct, frozen=True):
    """One image (or clip) to caption.

    pixels: one row of the encoder graph's input, as `preprocess` returns it; None where it goes
        another way than the request, as between processes. The scheduler never reads it.
    prompt_ids: forced first tokens, including the start token; at least one.
    stream: output new tokens after every step; else all of them at the end.
    id: unique among all processes of a run.
    """

    pixels: Any
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    scheduling: SchedulingParams = SchedulingParams()
    stream: bool = False
    id: int = field(default_factory=lambda: next(_ids))


class Timing(Struct, frozen=True):
    """Seconds a request spent in each stage; 0 for a stage it never reached.

    queue_s: waiting for slots. encode_s: from admission until the image K/V were written.
    decode_s: from there to the end. preprocess_s: of the image, before the engine.
    """

    queue_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    preprocess_s: float = 0.0

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, in the order in which a request passes through them."""
        return {
            "preprocess": self.preprocess_s,
            "queue": self.queue_s,
            "encode": self.encode_s,
            "decode": self.decode_s,
        }

    @property
    def total_s(self) -> float:
        """Seconds from arrival to end, without `preprocess_s`."""
        return self.queue_s + self.encode_s + self.decode_s


TopLogprobs = tuple[tuple[int, float], ...]  # (token, log-probability), best first


class Completion(Struct, frozen=True):
    """Generated tokens, including the end token, and the log-probability of each.

    top_logprobs: per position, the likeliest tokens and their log-probabilities, if requested.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    finish_reason: FinishReason | None = None

    def after(self, known: int) -> "Completion":
        """This completion without the first `known` tokens."""
        return Completion(
            self.token_ids[known:],
            self.logprobs[known:],
            self.top_logprobs[known:],
            self.finish_reason,
        )


class RequestOutput(Struct, frozen=True):
    """Tokens generated since the request's previous output; the final output also has the
    finish reason, the timing, and in `others` all completions but the first.
    """

    id: int
    completion: Completion
    timing: Timing | None = None
    others: tuple[Completion, ...] = ()

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the request ended; None while it goes on."""
        return self.completion.finish_reason

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first completion."""
        return self.completion.token_ids


class Caption(Struct, frozen=True):
    """The result of a request. Token counts exclude the start and end tokens.

    score: mean log-probability of the tokens, including the end token; None without tokens.
    others: all captions but the first.
    """

    text: str
    token_ids: tuple[int, ...]  # as generated, including the end token
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: Timing
    score: float | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    others: tuple["Caption", ...] = ()
