"""Response types, which are also the schemas of the OpenAPI document."""

from collections.abc import Sequence
from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType, defstruct
from msgspec.structs import asdict, fields

from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Caption, Timing
from server.ipc.messages import WorkerFacts, WorkerState
from server.service.model import Model


class Usage(Struct):
    """Token counts, excluding the start and end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> "Usage":
        """prompt: tokens of the prompt. completion: tokens generated."""
        return cls(prompt, completion, prompt + completion)


class TokenLogprob(Struct):
    """A token, spelled as in the vocabulary, and its log-probability."""

    token: str
    logprob: float


class ChosenToken(TokenLogprob):
    """A token of the caption, and the most likely tokens at its position."""

    top: list[TokenLogprob]


class AnotherCaption(Struct, kw_only=True):
    """One of several captions. score: mean log-probability of its tokens, the end token included;
    score_sum: their sum. logprobs: present only if requested.
    """

    caption: str
    score: float | None
    score_sum: float
    finish_reason: Literal["stop", "length"]
    logprobs: list[ChosenToken] | UnsetType = UNSET


class Milliseconds(Struct):
    """Milliseconds that a request spent in each stage, and in total."""

    queue: float
    preprocess: float
    encode: float
    decode: float
    total: float

    @classmethod
    def of(cls, timing: Timing, total_s: float) -> "Milliseconds":
        """total_s: the total in seconds."""
        seconds = {**timing.stages, "total": total_s}
        return cls(**{stage: round(1e3 * value, 2) for stage, value in seconds.items()})


class CaptionAnswer(AnotherCaption, kw_only=True):
    """A caption; if there are several, the best or first, with all of them in `captions`.

    engine: the engine and its precision, which decide captions.
    """

    model: str
    engine: str
    usage: Usage
    timing_ms: Milliseconds
    captions: list[AnotherCaption] | UnsetType = UNSET

    @classmethod
    def of(cls, caption: Caption, model: Model, total_s: float) -> "CaptionAnswer":
        """total_s: seconds since the end of the request's body."""
        tokenizer = model.tokenizer
        captions = caption, *caption.others
        return cls(
            **_told(caption, tokenizer),
            captions=[AnotherCaption(**_told(each, tokenizer)) for each in captions]
            if caption.others
            else UNSET,
            model=model.name,
            engine=model.identity,
            usage=Usage.of(caption.prompt_tokens, sum(c.completion_tokens for c in captions)),
            timing_ms=Milliseconds.of(caption.timing, total_s),
        )


def _told(caption: Caption, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """The fields of AnotherCaption."""

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


_OURS = ("epoch", "facts")  # fields of WorkerState: epoch is internal, facts are listed one by one
WorkerAnswer = defstruct(
    "WorkerAnswer",
    [(each.name, each.type) for each in fields(WorkerState) if each.name not in _OURS]
    + [(each.name, each.type | UnsetType, UNSET) for each in fields(WorkerFacts)],
    namespace={"__doc__": "An engine worker; what it runs is known once it has served."},
)


def worker_answer(worker: WorkerState) -> Any:
    """The WorkerAnswer of a worker."""
    told = asdict(worker) | ({} if worker.facts is None else asdict(worker.facts))
    return WorkerAnswer(**{name: value for name, value in told.items() if name not in _OURS})


class ReadyAnswer(Struct):
    """State of the server, of each model by name, and of each worker."""

    status: str
    models: dict[str, str]
    workers: list[WorkerAnswer]  # type: ignore[valid-type]


class ModelAnswer(Struct, kw_only=True):
    """A model in OpenAI's list format. slots: total over its engines. engine, precision: what its
    captions depend on, known once it has served.
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
        """The model's current state."""
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
    """code: machine-readable. message: what was wrong, and what to do."""

    code: str
    message: str


class ErrorAnswer(Struct):
    """The error response of every route except those of other protocols."""

    error: ErrorDetail
