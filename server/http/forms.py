"""Validated fields of a caption request, in whichever format it was sent."""

from dataclasses import dataclass
from typing import Any

from tornado import httputil

from runtime.errors import InvalidRequest
from server.images.clips import Clip
from server.protocols.errors import UnsupportedMediaType
from server.requests.fields import CaptionFields, checked
from server.requests.parts import MOST_IMAGES, Parts, shown, text
from server.service.service import Images

JSON, FORM, VIDEO = "application/json", "multipart/form-data", "video/"
URLENCODED = "application/x-www-form-urlencoded"
# curl --data-binary says x-www-form-urlencoded unless told otherwise; the body is the image.
_RAW_TYPES = ("", "application/octet-stream", URLENCODED)


def check_media_type(kind: str) -> None:
    """Raise UnsupportedMediaType for a body that is no image, clip, form or JSON."""
    if kind not in (*_RAW_TYPES, JSON, FORM) and not kind.startswith(("image/", VIDEO)):
        raise UnsupportedMediaType(
            f"Content-Type {shown(kind)} is not taken: send image/*, video/*, "
            "application/octet-stream, multipart/form-data or application/json"
        )


def query_fields(request: httputil.HTTPServerRequest) -> dict[str, Any]:
    """Fields from the query, and from headers that set a field. Raises InvalidRequest."""
    fields = {}
    for name, values in request.query_arguments.items():
        if len(values) > 1:
            raise InvalidRequest(f"{shown(name)} is given {len(values)} times: send it once")
        fields[name] = text(name, values[0])
    for name, header in (("timeout_ms", "X-Timeout-Ms"), ("priority", "X-Priority")):
        if header in request.headers:
            fields.setdefault(name, request.headers[header])
    return fields


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A parsed caption request. images: encoded, or URLs to fetch. listed: the images were sent as
    a list, so the answer is one, too.

    prompts: one per image, if the images have prompts of their own; fields.prompt replaces empty
    ones.
    """

    fields: CaptionFields
    images: list[bytes | str]
    prompts: list[str | None] | None = None
    listed: bool = False

    def is_list(self, frames: int | None) -> bool:
        """Whether each image gets its own answer. frames: how many the model takes, or None."""
        return self.listed or (len(self.images) > 1 and not frames)

    @property
    def alone(self) -> Images:
        """The images that are captioned together, or the URL of one."""
        first = self.images[0]
        if isinstance(first, str):
            return first
        return [each for each in self.images if isinstance(each, bytes)]


def parsed(parts: Parts, query: dict[str, Any]) -> ParsedRequest:
    """The request of a body and a query; fields of the body take precedence.

    Raises InvalidRequest naming what is wrong.
    """
    fields = query | {k: v for k, v in parts.fields.items() if k not in ("image", "video")}
    url, entries = fields.pop("image_url", None), fields.pop("images", None)
    urls = url if isinstance(url, list) else [] if url is None else [url]
    if len(urls) > MOST_IMAGES or not all(isinstance(each, str) for each in urls):
        raise InvalidRequest(f"image_url must be a string, or a list of {MOST_IMAGES} at most")
    if url is not None and (parts.images or not urls):
        raise InvalidRequest("send either image or image_url")
    count = len(urls) + len(parts.images)
    prompts = None if entries is None else _prompts(entries, len(parts.images))
    if isinstance(fields.get("prompt"), list):
        prompts = fields.pop("prompt")
        if not all(isinstance(prompt, str | None) for prompt in prompts):
            raise InvalidRequest("the field prompt must be a string, or a list of them")
        if len(prompts) != count:
            raise InvalidRequest(
                f"{len(prompts)} prompts and {count} images were sent: send one prompt for all, or "
                "one for each"
            )
    wanted = checked(CaptionFields, fields)
    if parts.video is not None:
        if url is not None or parts.images or prompts is not None:
            raise InvalidRequest("send either video or images")
        return ParsedRequest(wanted, [Clip(parts.video)])
    if url is None and not parts.images:
        raise InvalidRequest("the field 'image' is missing or not a string: send it as base64")
    if prompts is None and not all(parts.images):
        raise InvalidRequest("the image is empty: send a whole file")
    listed = prompts is not None or isinstance(url, list)
    return ParsedRequest(wanted, [*urls, *parts.images], prompts, listed)


def _prompts(entries: Any, images: int) -> list[str | None]:
    """The prompt of each image of a JSON body. Raises InvalidRequest."""
    if not isinstance(entries, list) or not entries or len(entries) != images:
        raise InvalidRequest(
            "images must be a list of base64, or of objects with image and prompt, and stand alone"
        )
    found = []
    for entry in entries:
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if isinstance(entry, dict) and (other := sorted(entry.keys() - {"image", "prompt"})):
            raise InvalidRequest(f"unknown field {shown(other[0])} of images: image and prompt")
        if not isinstance(prompt, str | None):
            raise InvalidRequest("the field images.prompt must be a string")
        found.append(prompt)
    return found
