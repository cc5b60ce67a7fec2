"""What a caption request asks for, whichever way it was sent: its fields, checked."""

from typing import Any

from tornado import httputil

from runtime.errors import InvalidRequest
from server.bodies import Parts, shown, text
from server.errors import UnsupportedMediaType
from server.http.schemas import CaptionFields, checked

JSON, FORM = "application/json", "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
# curl --data-binary says x-www-form-urlencoded unless told otherwise; the body is the image.
_RAW_TYPES = ("", "application/octet-stream", URLENCODED)


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


def asked(parts: Parts, query: dict[str, Any]) -> tuple[CaptionFields, list[bytes] | str]:
    """What to do, and with what: encoded images, one or one a frame, or where one is to be fetched.

    Fields of the body count above those of the query. Raises InvalidRequest naming what is wrong.
    """
    fields = query | parts.fields
    url = fields.pop("image_url", None)
    if url is not None and (parts.images or not isinstance(url, str)):
        raise InvalidRequest("send either image or image_url, and the latter as a string")
    wanted = checked(CaptionFields, fields)
    if url is None and not parts.images:
        raise InvalidRequest("the field 'image' is missing or not a string: send it as base64")
    if not all(parts.images):
        raise InvalidRequest("the image is empty: send a whole file")
    return wanted, url or parts.images
