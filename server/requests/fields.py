"""Fields of a request besides its images, shared by all protocols."""

import re
from typing import Annotated, Any, Literal, TypeVar

from msgspec.structs import fields
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from runtime.errors import InvalidRequest
from runtime.request import RANGES, Priority, SamplingParams
from server.requests.parts import shown

_KINDS = {"str", "bool", "int", "float"}
_FIELDS = 64  # more than any request has
_DIGITS = 9  # of a token count
_MOST_DIGITS = 19  # of any number: a seed has 63 bits


def _whole(value: Any) -> Any:
    """Convert digits, as forms and queries send them, to an int; return all else unchanged."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) <= _MOST_DIGITS:
            return int(value)
    return value


def _flag(value: Any) -> Any:
    """Convert true and false, as forms and queries send them; return all else unchanged."""
    known = {"true": True, "false": False}
    return known.get(value.lower(), value) if isinstance(value, str) else value


def _ranged(name: str, description: str) -> Any:
    least, most = RANGES[name]
    whole = isinstance(_DEFAULTS[name], int)
    return Field(ge=least, le=most, strict=whole, allow_inf_nan=False, description=description)


_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
SAMPLING = _DEFAULTS.keys() - {"ignore_eos"}
_Flag = Annotated[bool, Field(strict=True), BeforeValidator(_flag)]
_DIGITS_READ = BeforeValidator(_whole)  # after a range: before it, the schema would lack the range


Shape = TypeVar("Shape", bound=BaseModel)


def checked(shape: type[Shape], fields: dict[str, Any]) -> Shape:
    """Validate the fields of a request. Raises InvalidRequest naming what is wrong."""
    if len(fields) > _FIELDS:  # building an error for each takes long
        raise InvalidRequest(f"{len(fields)} fields: there are {', '.join(shape.model_fields)}")
    try:
        return shape.model_validate(fields)
    except ValidationError as cause:
        errors = cause.errors(include_url=False, include_input=False)
        if errors[0]["type"] == "extra_forbidden":
            name, there = ".".join(map(str, errors[0]["loc"])), ", ".join(shape.model_fields)
            raise InvalidRequest(f"unknown field {shown(name)}: there are {there}") from None
        place = _place(errors[0])
        same = [each["msg"] for each in errors if _place(each) == place]  # one per union member
        said = ", or ".join(dict.fromkeys(message.removeprefix("Input ") for message in same))
        raise InvalidRequest(f"the field {shown(place)} {said}") from None


def _place(error: Any) -> str:
    """The error's place by fields and indices, without pydantic's names of union members."""
    parts = map(str, error["loc"])
    return ".".join(p for p in parts if p not in _KINDS and re.fullmatch("[a-z_]+|[0-9]+", p))


class CaptionFields(BaseModel):
    """Options of a caption request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[
        str | None, Field(description="Which of the server's models; the first if none is named.")
    ] = None
    prompt: Annotated[
        str | None,
        Field(description="Text that the caption goes on from; for VQA checkpoints the question."),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Field(ge=1, lt=10**_DIGITS, strict=True, description="Most tokens of the caption; prompt "
              "and caption share the positions of a slot."),
        _DIGITS_READ,
    ] = None  # fmt: skip
    min_new_tokens: Annotated[
        int | None,
        _ranged("min_new_tokens", "Fewest tokens of the caption."),
        _DIGITS_READ,
    ] = None
    timeout_ms: Annotated[
        int | None,
        Field(ge=100, le=3_600_000, strict=True, description="Deadline; past it the answer is 504, "
              "and a request that still waits is not run."),
        _DIGITS_READ,
    ] = None  # fmt: skip
    priority: Annotated[
        Priority, Field(description="batch waits while interactive requests wait.")
    ] = Priority.INTERACTIVE
    first_frame: Annotated[
        _Flag, Field(description="Of a clip take the first frame, where a model takes one image.")
    ] = False
    stream: Annotated[
        _Flag,
        Field(description="Answer with server-sent events, one for each token, as Accept: "
              "text/event-stream does."),
    ] = False  # fmt: skip
    n: Annotated[
        int | None,
        _ranged("n", "Captions to return; several take num_beams, or a temperature."),
        _DIGITS_READ,
        Field(validation_alias=AliasChoices("n", "num_return_sequences")),
    ] = None
    logprobs: Annotated[
        int | None,
        _ranged("logprobs", "Tell each token's log-probability, and so many of the likeliest."),
        _DIGITS_READ,
    ] = None
    num_beams: Annotated[
        int | None,
        _ranged("num_beams", "Texts to follow at once; the best is returned."),
        _DIGITS_READ,
    ] = None
    length_penalty: Annotated[
        float | None, _ranged("length_penalty", "Of beams: above 0 for long captions.")
    ] = None
    early_stopping: Annotated[
        _Flag | Literal["never"] | None,
        Field(description="Of beams: true ends once there are num_beams captions, never looks for "
              "better ones to the last."),
    ] = None  # fmt: skip
    no_repeat_ngram_size: Annotated[
        int | None,
        _ranged("no_repeat_ngram_size", "So many tokens in a row are there only once."),
        _DIGITS_READ,
    ] = None
    repetition_penalty: Annotated[
        float | None, _ranged("repetition_penalty", "Above 1 for fewer repetitions.")
    ] = None
    temperature: Annotated[
        float | None, _ranged("temperature", "0 takes the likeliest token, more draws one.")
    ] = None
    top_k: Annotated[
        int | None,
        _ranged("top_k", "Draw from so many of the likeliest tokens."),
        _DIGITS_READ,
    ] = None
    top_p: Annotated[
        float | None, _ranged("top_p", "Draw from the fewest tokens that are together so likely.")
    ] = None
    seed: Annotated[
        int | None,
        _ranged("seed", "The same one draws the same tokens."),
        _DIGITS_READ,
    ] = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The given fields of SamplingParams."""
        return self.model_dump(include=SAMPLING, exclude_unset=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if value not in (None, "")}
