"""What callers ask for and what they get, as it travels between threads and processes.

A `GenerationRequest` is made once, where it is parsed, and carried whole. Times are
`time.perf_counter()` seconds, which all processes of a machine share.
"""

import itertools
import secrets
from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field
from msgspec.structs import replace

from runtime.errors import ComputationFailed

if TYPE_CHECKING:
    from runtime.model.tokenizer import CaptionTokenizer

_ids = itertools.count(secrets.randbits(30) << 32)  # no other process of a run counts from there


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # the model said its end token
    LENGTH = "length"  # max_new_tokens were generated
    CANCELLED = "cancelled"  # the caller took it back
    EXPIRED = "expired"  # its deadline passed while it waited; it was never run
    FAILED = "failed"  # the model's numbers broke down (NaN), of this row alone
    ERROR = "error"  # an error of ours, which the log tells


class Priority(StrEnum):
    """Who is admitted first."""

    INTERACTIVE = "interactive"
    BATCH = "batch"


class SamplingParams(Struct, frozen=True):
    """What to generate: the likeliest token each time, unless something else is asked for. Names
    and meanings are those of Hugging Face's `generate`.

    max_new_tokens: most tokens to generate, the end token included.
    min_new_tokens: before so many the model does not say its end token.
    ignore_eos: generate all of them whatever the model says; for measuring speed.
    n: captions to return (`num_return_sequences`); several take beams, or a temperature.
    logprobs: of how many of the likeliest tokens at each place the log-probability is told.
    num_beams: texts that are followed at once; the best is returned.
    length_penalty, early_stopping: how beams are ranked, and when they are over; the latter is
        True, False or "never".
    no_repeat_ngram_size: of n-grams that may be there only once; 0 allows all.
    repetition_penalty: what the scores of tokens that were there before are divided by.
    temperature: 0 takes the likeliest token, anything above draws one.
    top_k, top_p: which tokens are drawn from: so many, and no more than together are so likely.
    seed: the same one draws the same tokens.
    """

    max_new_tokens: int
    ignore_eos: bool = False
    n: int = 1
    logprobs: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    min_new_tokens: int = 0

    @property
    def rows(self) -> int:
        """Rows of the batch, each a slot, that the request takes."""
        return max(self.num_beams, self.n)


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
    def stages(self) -> dict[str, float]:
        """Seconds of each, in the order in which a request goes through them."""
        return {
            "preprocess": self.preprocess_s,
            "queue": self.queue_s,
            "encode": self.encode_s,
            "decode": self.decode_s,
        }

    @property
    def total_s(self) -> float:
        """From its arrival to its end."""
        return self.queue_s + self.encode_s + self.decode_s


TopLogprobs = tuple[tuple[int, float], ...]  # tokens and their log-probabilities, best first


class Completion(Struct, frozen=True):
    """Generated tokens, the end token included, and the log-probability of each.

    top_logprobs: at each place those of the likeliest tokens, as many as were asked for.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    finish_reason: FinishReason | None = None

    def after(self, known: int) -> "Completion":
        """Without its first `known` tokens."""
        return Completion(
            self.token_ids[known:],
            self.logprobs[known:],
            self.top_logprobs[known:],
            self.finish_reason,
        )


class RequestOutput(Struct, frozen=True):
    """News of a request: what was generated since the last of its outputs; at the end also why it
    ended, when, and the `others` of several completions.
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
        """Token ids of the first, or only, completion."""
        return self.completion.token_ids


class Caption(Struct, frozen=True):
    """What a request got. Token counts leave the start and end tokens out.

    score: mean log-probability of its tokens, the end token included; None if it was captioned
    where that is not told. others: of several captions all but the first.
    """

    text: str
    token_ids: tuple[int, ...]  # as generated, the end token included
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: Timing
    score: float | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    others: tuple["Caption", ...] = ()


def joined(outputs: Iterable[RequestOutput]) -> RequestOutput:
    """The outputs of a request that has ended as one. Raises ComputationFailed if it FAILED, or
    ended in an ERROR.
    """
    news = []
    for output in outputs:
        news.append(output.completion)
    if output.finish_reason is FinishReason.FAILED:
        raise ComputationFailed(
            "the model's numbers broke down (NaN) on this image: caption it with an engine of "
            "another precision, such as fp32"
        )
    if output.finish_reason is FinishReason.ERROR:
        raise ComputationFailed("captioning this image met an error: the service's log tells which")
    whole = Completion(
        tuple(itertools.chain.from_iterable(each.token_ids for each in news)),
        tuple(itertools.chain.from_iterable(each.logprobs for each in news)),
        tuple(itertools.chain.from_iterable(each.top_logprobs for each in news)),
        output.finish_reason,
    )
    return replace(output, completion=whole)


def captioned(
    request: GenerationRequest, output: RequestOutput, tokenizer: "CaptionTokenizer"
) -> Caption:
    """The caption in all that was generated for a request."""
    timing = output.timing
    assert timing is not None

    def caption(completion: Completion, others: tuple[Caption, ...] = ()) -> Caption:
        reason, count = completion.finish_reason, len(completion.token_ids)
        assert reason is not None
        return Caption(
            text=tokenizer.text(completion.token_ids),
            token_ids=completion.token_ids,
            finish_reason=reason,
            prompt_tokens=len(request.prompt_ids) - 1,
            completion_tokens=count - (reason is FinishReason.STOP),
            timing=timing,
            score=sum(completion.logprobs) / count if count else None,
            logprobs=completion.logprobs,
            top_logprobs=completion.top_logprobs,
            others=others,
        )

    return caption(output.completion, tuple(caption(other) for other in output.others))
