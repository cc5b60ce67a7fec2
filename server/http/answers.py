"""What is answered: made of these types, and described by them in OpenAPI."""

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, defstruct
from msgspec.structs import asdict, fields

from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Caption, Timing
from server.ipc.messages import WorkerFacts, WorkerState
from server.service.model import Model


class Usage(Struct):
    """Tokens, without the start and end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "Usage":
        """Tokens of the prompt, and of all that was generated."""
        return cls(prompt, completion, prompt + completion)


class TokenLogprob(Struct):
    """A token as the vocabulary has it, and its log-probability."""

    token: str
    logprob: float


class ChosenToken(TokenLogprob):
    """A token of the caption, and the likeliest in its place."""

    top: list[TokenLogprob]


class AnotherCaption(Struct, kw_only=True):
    """One of several captions. score: mean log-probability of its tokens, the end token included;
    score_sum: the sum of them. logprobs: only if they were asked for.
    """

    caption: str
    score: float | None
    score_sum: float
    finish_reason: Literal["stop", "length"]
    logprobs: list[ChosenToken] | UnsetType = UNSET


class Milliseconds(Struct):
    """Where a request's time went."""

    queue: float
    preprocess: float
    encode: float
    decode: float
    total: float

    @classmethod
    def of(cls, timing: Timing, total_s: float) -> "Milliseconds":
        """total_s: seconds."""
        seconds = {**timing.stages, "total": total_s}
        return cls(**{stage: round(1e3 * value, 2) for stage, value in seconds.items()})


class CaptionAnswer(AnotherCaption, kw_only=True):
    """A caption; of several the best or first, and all of them in `captions`."""

    model: str
    usage: Usage
    timing_ms: Milliseconds
    captions: list[AnotherCaption] | UnsetType = UNSET

    @classmethod
    def of(
        cls, caption: Caption, model: str, tokenizer: CaptionTokenizer, total_s: float
    ) -> "CaptionAnswer":
        """total_s: seconds from the end of the request's body to now."""
        captions = caption, *caption.others
        return cls(
            **_told(caption, tokenizer),
            captions=[AnotherCaption(**_told(each, tokenizer)) for each in captions]
            if caption.others
            else UNSET,
            model=model,
            usage=Usage.of(caption.prompt_tokens, sum(c.completion_tokens for c in captions)),
            timing_ms=Milliseconds.of(caption.timing, total_s),
        )


def _told(caption: Caption, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Fields of AnotherCaption."""

    def likely(candidates: Sequence[tuple[int, float]]) -> list[TokenLogprob]:
        return [TokenLogprob(tokenizer.token(token), logprob) for token, logprob in candidates]

    places = zip(caption.token_ids, caption.logprobs, caption.top_logprobs, strict=False)
    logprobs = [
        ChosenToken(tokenizer.token(chosen), logprob, likely(top))
        for chosen, logprob, top in places
    ]
    return {
        "caption": caption.text,
        "score": caption.score,
        "score_sum": sum(caption.logprobs),
        "finish_reason": caption.finish_reason,
        "logprobs": logprobs or UNSET,
    }


_OURS = ("epoch", "facts")  # of WorkerState, which are not told, or one by one
WorkerAnswer = defstruct(
    "WorkerAnswer",
    [(each.name, each.type) for each in fields(WorkerState) if each.name not in _OURS]
    + [(each.name, each.type | UnsetType, UNSET) for each in fields(WorkerFacts)],
    namespace={"__doc__": "An engine worker; what it runs is known once it has served."},
)


def worker_answer(worker: WorkerState) -> Any:
    """A WorkerAnswer."""
    told = asdict(worker) | ({} if worker.facts is None else asdict(worker.facts))
    return WorkerAnswer(**{name: value for name, value in told.items() if name not in _OURS})


class ReadyAnswer(Struct):
    """The state of the server, of each model by its name, and of each worker."""

    status: str
    models: dict[str, str]
    workers: list[WorkerAnswer]  # type: ignore[valid-type]


class ModelAnswer(Struct, kw_only=True):
    """A model as OpenAI lists its own, and what its captions depend on, which is known once it has
    served. slots: of all its engines.
    """

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "vignette"
    status: str
    slots: int
    engine: str | None = None
    precision: str | None = None

    @classmethod
    def of(cls, model: Model) -> "ModelAnswer":
        """As it is now."""
        facts = model.facts
        return cls(
            id=model.name,
            status=model.status,
            slots=sum(each.slots * each.engines for each in facts),
            engine=facts[0].engine if facts else None,
            precision=facts[0].precision if facts else None,
        )


class ModelsAnswer(Struct):
    """The models of a server."""

    data: list[ModelAnswer]
    object: Literal["list"] = "list"


class ErrorDetail(Struct):
    """code: for programs. message: what was wrong, and what to do."""

    code: str
    message: str


class ErrorAnswer(Struct):
    """Every error, of every route but those of other protocols."""

    error: ErrorDetail
