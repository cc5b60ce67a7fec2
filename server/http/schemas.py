"""What requests and answers hold: checked by these classes, and described by them in OpenAPI."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from runtime.errors import InvalidRequest
from runtime.request import Caption, Priority
from server.http.bodies import shown

_DIGITS = 9  # of a number in a form


def _whole(value: Any) -> Any:
    """Digits as forms and queries send them, as an int; all else as it is."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
            return int(value)
    return value


_Number = Annotated[int, Field(strict=True), BeforeValidator(_whole)]


class CaptionFields(BaseModel):
    """What to do with an image."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[
        str | None, Field(description="Which of the server's models; the first if none is named.")
    ] = None
    prompt: Annotated[
        str | None,
        Field(description="Text that the caption goes on from; for VQA checkpoints the question."),
    ] = None
    max_new_tokens: Annotated[
        _Number | None,
        Field(ge=1, lt=10**_DIGITS, description="Most tokens of the caption; prompt and caption "
              "share the positions of a slot."),
    ] = None  # fmt: skip
    timeout_ms: Annotated[
        _Number | None,
        Field(ge=100, le=3_600_000, description="Deadline; past it the answer is 504, and a "
              "request that still waits is not run."),
    ] = None  # fmt: skip
    priority: Annotated[
        Priority, Field(description="batch waits while interactive requests wait.")
    ] = Priority.INTERACTIVE

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value not in (None, "")}

    @classmethod
    def checked(cls, fields: dict[str, Any]) -> "CaptionFields":
        """The fields of a request. Raises InvalidRequest naming what is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as cause:
            error = cause.errors(include_url=False, include_input=False)[0]
            name = shown(error["loc"][0])
            if error["type"] == "extra_forbidden":
                there = ", ".join(cls.model_fields)
                raise InvalidRequest(f"unknown field {name}: there are {there}") from None
            said = error["msg"].removeprefix("Input ")
            raise InvalidRequest(f"the field {name} {said}") from None


class CaptionRequest(CaptionFields):
    """Either image or image_url."""

    image: Annotated[
        str | list[str] | None,
        Field(description="Base64, also as a data URL; a list with one for each frame for video "
              "checkpoints."),
    ] = None  # fmt: skip
    image_url: Annotated[
        str | None,
        Field(pattern="^https://", description="Where to fetch the image; switched off unless the "
              "server allows domains."),
    ] = None  # fmt: skip


class Usage(BaseModel):
    """Tokens, without the start and end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Milliseconds(BaseModel):
    """Where a request's time went."""

    queue: float
    preprocess: float
    encode: float
    decode: float
    total: float


class CaptionAnswer(BaseModel):
    """A caption."""

    caption: str
    model: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timing_ms: Milliseconds

    @classmethod
    def of(cls, caption: Caption, model: str, total_s: float) -> "CaptionAnswer":
        """total_s: seconds from the end of the request's body to now."""
        timing, used = caption.timing, (caption.prompt_tokens, caption.completion_tokens)
        seconds = timing.queue_s, timing.preprocess_s, timing.encode_s, timing.decode_s, total_s
        ms = (round(each * 1e3, 2) for each in seconds)
        return cls.model_construct(
            caption=caption.text,
            model=model,
            finish_reason=caption.finish_reason,
            usage=Usage.model_construct(
                prompt_tokens=used[0], completion_tokens=used[1], total_tokens=sum(used)
            ),
            timing_ms=Milliseconds(**dict(zip(Milliseconds.model_fields, ms, strict=True))),
        )


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


class ReadyAnswer(BaseModel):
    """Of the server, of each model by its name, and of each worker."""

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
