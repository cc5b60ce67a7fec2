"""What a caption request asks for, whichever way it was sent: its fields, checked."""

from dataclasses import dataclass
from typing import Any

from tornado import httputil

from runtime.errors import InvalidRequest
from runtime.request import Priority
from server.http.bodies import Parts, shown, text
from server.http.errors import UnsupportedMediaType

JSON, FORM = "application/json", "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
_FIELDS = ("prompt", "max_new_tokens", "timeout_ms", "priority")
# curl --data-binary says x-www-form-urlencoded unless told otherwise; the body is the image.
_RAW_TYPES = ("", "application/octet-stream", URLENCODED)
_DIGITS = 9  # of a number in a form
_LARGE = 10**_DIGITS  # more than any field may be
_LEAST_TIMEOUT_MS = 100  # less is spent on the way
_LONGEST_TIMEOUT_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """A request as it was sent: encoded images (one, or one a frame) and what to do with them."""

    images: list[bytes]
    prompt: str | None = None
    max_new_tokens: int | None = None
    timeout_ms: int | None = None
    priority: Priority = Priority.INTERACTIVE
    image_url: str | None = None


def check_media_type(kind: str) -> None:
    """Raise UnsupportedMediaType for what is no image, form or JSON."""
    if kind not in (*_RAW_TYPES, JSON, FORM) and not kind.startswith("image/"):
        raise UnsupportedMediaType(
            f"Content-Type {shown(kind)} is not taken: send image/*, application/octet-stream, "
            "multipart/form-data or application/json"
        )


def query_fields(request: httputil.HTTPServerRequest) -> dict[str, Any]:
    """Fields of the query, and of the headers that stand for some. Raises InvalidRequest."""
    fields = {}
    for name, values in request.query_arguments.items():
        if len(values) > 1:
            raise InvalidRequest(f"{shown(name)} is given {len(values)} times: send it once")
        fields[name] = text(name, values[0])
    for name, header in (("timeout_ms", "X-Timeout-Ms"), ("priority", "X-Priority")):
        if header in request.headers:
            fields.setdefault(name, request.headers[header])
    return fields


def asked(parts: Parts, query: dict[str, Any]) -> CaptionRequest:
    """What a request asks for; fields of its body count above those of its query.

    Raises InvalidRequest naming what is wrong.
    """
    fields = query | parts.fields
    url = fields.pop("image_url", None)
    if url is not None and (parts.images or not isinstance(url, str)):
        raise InvalidRequest("send either image or image_url, and the latter as a string")
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {shown(unknown[0])}: there are {', '.join(_FIELDS)}")
    if url is None and not parts.images:
        raise InvalidRequest("the field 'image' is missing or not a string: send it as base64")
    if not all(parts.images):
        raise InvalidRequest("the image is empty: send a whole file")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | None):
        raise InvalidRequest("prompt must be a string")
    priority = fields.get("priority") or Priority.INTERACTIVE
    if priority not in [*Priority]:
        raise InvalidRequest(f"priority must be one of {', '.join(Priority)}")
    timeout = _whole_number("timeout_ms", fields.get("timeout_ms"))
    if timeout is not None and not _LEAST_TIMEOUT_MS <= timeout <= _LONGEST_TIMEOUT_MS:
        raise InvalidRequest(
            f"timeout_ms must be between {_LEAST_TIMEOUT_MS} and {_LONGEST_TIMEOUT_MS}"
        )
    most = _whole_number("max_new_tokens", fields.get("max_new_tokens"))
    return CaptionRequest(parts.images, prompt, most, timeout, Priority(priority), url)


def _whole_number(name: str, value: Any) -> int | None:
    """An int, or digits as forms send them; an empty form field is none at all."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
            value = int(value)
    if value is None or value == "":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-_LARGE, min(value, _LARGE))  # JSON has numbers of any length
    raise InvalidRequest(f"{name} must be a whole number")
