"""The three forms of a caption request: raw image, multipart form, base64 in JSON."""

import base64
import binascii
import json
from dataclasses import dataclass
from email.message import Message
from typing import Any

from tornado import httputil

from runtime.errors import InvalidRequest
from server.errors import UnsupportedMediaType

_FIELDS = ("prompt", "max_new_tokens", "timeout_ms", "priority")
_PRIORITIES = ("interactive", "batch")
# curl --data-binary says x-www-form-urlencoded unless told otherwise; the body is the image.
_RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")
_DIGITS = 9  # of a number in a form
_LEAST_TIMEOUT_MS = 100  # less is spent on the way
_LONGEST_TIMEOUT_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was sent: encoded images (one, or one a frame) and what to do with them."""

    images: list[bytes]
    prompt: str | None = None
    max_new_tokens: int | None = None
    timeout_ms: int | None = None
    urgent: bool = True
    image_url: str | None = None


def asked(request: httputil.HTTPServerRequest, body: bytes) -> Asked:
    """What a request asks for; its body apart, because it was streamed.

    Raises UnsupportedMediaType, or InvalidRequest naming what is wrong.
    """
    content_type = request.headers.get("Content-Type", "").lower()
    kind = content_type.partition(";")[0].strip()
    if kind not in (*_RAW_TYPES, "application/json", "multipart/form-data") and not (
        kind.startswith("image/")
    ):
        raise UnsupportedMediaType(
            f"Content-Type {kind} is not taken: send image/*, application/octet-stream, "
            "multipart/form-data or application/json"
        )
    if not body:
        raise InvalidRequest("the body is empty: send an image")
    if kind == "application/json":
        return _from_json(body, _query(request))
    if kind == "multipart/form-data":
        return _from_form(request, body)
    return _checked([body], _query(request))


def _query(request: httputil.HTTPServerRequest) -> dict[str, Any]:
    """Fields of the query, and of the headers that stand for some."""
    fields = {name: _text(name, values[-1]) for name, values in request.query_arguments.items()}
    for name, header in (("timeout_ms", "X-Timeout-Ms"), ("priority", "X-Priority")):
        if header in request.headers:
            fields.setdefault(name, request.headers[header])
    return fields


def _from_json(body: bytes, query: dict[str, Any]) -> Asked:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise InvalidRequest('the body is not JSON: send {"image": "<base64>"} in UTF-8') from cause
    if not isinstance(fields, dict):
        raise InvalidRequest('the JSON is not an object: send {"image": "<base64>"}')
    fields = query | fields
    url, sent = fields.pop("image_url", None), fields.pop("image", None)
    if url is not None:
        if sent is not None or not isinstance(url, str):
            raise InvalidRequest("send either image or image_url, and the latter as a string")
        return _checked([], fields, url)
    images = sent if isinstance(sent, list) else [sent]
    return _checked([_from_base64(image) for image in images], fields)


def _from_form(request: httputil.HTTPServerRequest, body: bytes) -> Asked:
    arguments: dict[str, list[bytes]] = dict(request.query_arguments)
    files: dict[str, list[httputil.HTTPFile]] = {}
    head = Message()
    head["Content-Type"] = request.headers["Content-Type"]
    try:
        boundary = (head.get_boundary("") or "").encode("latin-1", "replace")
        httputil.parse_multipart_form_data(boundary, body, arguments, files)
    except (httputil.HTTPInputError, ValueError, LookupError) as cause:
        raise InvalidRequest(
            "the multipart body can't be read: check its boundary and headers"
        ) from cause
    images = [file.body for file in files.pop("image", [])] or arguments.pop("image", [])
    if files:
        raise InvalidRequest(f"unknown file field {next(iter(files))!r}: use the field 'image'")
    if not images:
        raise InvalidRequest("the form has no field 'image': add the image under that name")
    fields = {k: _text(k, values[-1]) for k, values in arguments.items()}
    return _checked(images, _query(request) | fields)


def _text(field: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as cause:
        raise InvalidRequest(f"{field} is not UTF-8") from cause


def _from_base64(image: Any) -> bytes:
    if not isinstance(image, str):
        raise InvalidRequest("the field 'image' is missing or not a string: send it as base64")
    if image.startswith("data:"):
        image = image.partition(",")[2]
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise InvalidRequest("the field 'image' is not base64") from cause


def _checked(images: list[bytes], fields: dict[str, Any], url: str | None = None) -> Asked:
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0]!r}: there are {', '.join(_FIELDS)}")
    if not all(images):
        raise InvalidRequest("the image is empty: send a whole file")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | None):
        raise InvalidRequest("prompt must be a string")
    priority = fields.get("priority") or _PRIORITIES[0]
    if priority not in _PRIORITIES:
        raise InvalidRequest(f"priority must be one of {', '.join(_PRIORITIES)}")
    timeout = _whole_number("timeout_ms", fields.get("timeout_ms"))
    if timeout is not None and not _LEAST_TIMEOUT_MS <= timeout <= _LONGEST_TIMEOUT_MS:
        raise InvalidRequest(
            f"timeout_ms must be between {_LEAST_TIMEOUT_MS} and {_LONGEST_TIMEOUT_MS}"
        )
    most = _whole_number("max_new_tokens", fields.get("max_new_tokens"))
    return Asked(images, prompt, most, timeout, priority == _PRIORITIES[0], url)


def _whole_number(name: str, value: Any) -> int | None:
    """An int, or digits as forms send them; an empty form field is none at all."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
            value = int(value)
    if value is None or value == "" or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value == "" else value
    raise InvalidRequest(f"{name} must be a whole number")
