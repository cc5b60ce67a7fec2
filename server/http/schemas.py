"""What requests and answers hold: checked by these classes, and described by them in OpenAPI."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
)

from runtime.model.tokenizer import CaptionTokenizer
from runtime.request import Caption
from server.fields import CaptionFields


class ImageEntry(BaseModel):
    """One of several images. image: base64, also as a data URL."""

    image: str
    prompt: str | None = None


class CaptionRequest(CaptionFields):
    """Either image, images or image_url."""

    image: Annotated[
        str | list[str] | None,
        Field(description="Base64, also as a data URL; a list with one for each frame for video "
              "checkpoints."),
    ] = None  # fmt: skip
    images: Annotated[
        list[str | ImageEntry] | None,
        Field(max_length=64, description="Several, each with a caption or an error of its own."),
    ] = None
    video: Annotated[
        str | None, Field(description="Base64 of a clip, of which frames are taken evenly.")
    ] = None
    image_url: Annotated[
        Annotated[str, Field(pattern="^https://")] | list[str] | None,
        Field(description="Where to fetch the image, or several; switched off unless the server "
              "allows domains."),
    ] = None  # fmt: skip


class Usage(BaseModel):
    """Tokens, without the start and end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenLogprob(BaseModel):
    """A token as the vocabulary has it, and its log-probability."""

    token: str
    logprob: float


class ChosenToken(TokenLogprob):
    """A token of the caption, and the likeliest in its place."""

    top: list[TokenLogprob]


class AnotherCaption(BaseModel):
    """One of several captions. score: mean log-probability of its tokens, the end token included;
    score_sum: the sum of them.
    """

    caption: str
    score: float
    score_sum: float
    finish_reason: Literal["stop", "length"]
    logprobs: list[ChosenToken] | None = None

    @classmethod
    def fields_of(cls, caption: Caption, tokenizer: CaptionTokenizer) -> dict[str, Any]:
        """By their names; without logprobs unless they were asked for."""
        fields: dict[str, Any] = {
            "caption": caption.text,
            "score": caption.score,
            "score_sum": sum(caption.logprobs),
            "finish_reason": caption.finish_reason,
        }
        if caption.top_logprobs:
            places = zip(caption.token_ids, caption.logprobs, caption.top_logprobs, strict=True)
            fields["logprobs"] = [
                {
                    "token": tokenizer.token(chosen),
                    "logprob": logprob,
                    "top": [{"token": tokenizer.token(t), "logprob": p} for t, p in top],
                }
                for chosen, logprob, top in places
            ]
        return fields


class Milliseconds(BaseModel):
    """Where a request's time went."""

    queue: float
    preprocess: float
    encode: float
    decode: float
    total: float


class CaptionAnswer(AnotherCaption):
    """A caption; of several the best or first, and all of them in `captions`."""

    model: str
    usage: Usage
    timing_ms: Milliseconds
    captions: list[AnotherCaption] | None = None

    @classmethod
    def of(
        cls, caption: Caption, model: str, tokenizer: CaptionTokenizer, total_s: float
    ) -> dict[str, Any]:
        """As JSON has it. total_s: seconds from the end of the request's body to now."""
        timing, captions = caption.timing, (caption, *caption.others)
        completion = sum(each.completion_tokens for each in captions)
        seconds = timing.queue_s, timing.preprocess_s, timing.encode_s, timing.decode_s, total_s
        first, *others = (cls.fields_of(each, tokenizer) for each in captions)
        fields = dict(first)
        if others:
            fields["captions"] = [first, *others]
        fields["model"] = model
        fields["usage"] = {
            "prompt_tokens": caption.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": caption.prompt_tokens + completion,
        }
        stages = zip(Milliseconds.model_fields, seconds, strict=True)
        fields["timing_ms"] = {stage: round(each * 1e3, 2) for stage, each in stages}
        return fields


class SeveralAnswer(BaseModel):
    """Answers for several images, in their order."""

    results: list["CaptionAnswer | ErrorAnswer"]


class WorkerAnswer(BaseModel):
    """An engine worker; what it runs is known once it has served."""

    model: str
    index: int
    state: Literal["starting", "ready", "recovering", "over"]
    pid: int | None
    restarts: int
    last_end: str | None
    engine: str = ""
    precision: str = ""
    runs_on: str = ""
    provider: str = ""
    self_test: str = ""
    seconds: float | None = None
    device: str = ""
    slots: int = 0
    engines: int = 1


class ReadyAnswer(BaseModel):
    """The state of the server, of each model by its name, and of each worker."""

    status: Literal["starting", "ready", "recovering", "draining"]
    models: dict[str, Literal["starting", "ready", "recovering", "draining"]]
    workers: list[WorkerAnswer]


class ErrorDetail(BaseModel):
    """code: for programs. message: what was wrong, and what to do."""

    code: str
    message: str


class ErrorAnswer(BaseModel):
    """Every error, of every route."""

    error: ErrorDetail
