"""Parses request bodies (multipart forms and JSON) within bounds on their contents.

Only images may be large. For JSON, this is checked before any object is built: strings are located
first, and short marks replace long ones in the text that is parsed.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from msgspec import msgpack
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from runtime.errors import InvalidRequest

PIECE = 64 * 1024  # bytes of a form parsed at a time: a millisecond at most
_CONTENT_TYPE = 512  # characters of the header
_BOUNDARY = 70  # characters, by RFC 2046
_PARTS = 64  # most parts of a form
_SHOWN = 100  # characters of client input repeated in a message
_TEXT = 16 * 1024  # bytes of a field other than an image, and of JSON outside strings
_OUTLINE = 64 * 1024  # bytes of a JSON document without its images
_QUOTES = 1024  # quotes of a JSON document that end a string or are escaped in one
_DEPTH, _VALUES = 8, 512  # levels of nesting, and values, of a JSON document
_UNESCAPED = 16  # fewest base64 characters per escape: some programs escape each "/" or "+"
_MARK = b'"\\u0000'  # start of a mark for a long string, whose index follows
MOST_IMAGES = 64  # per request
_WHITESPACE = str.maketrans("", "", " \t\r\n")
_NO_OBJECT = 'send {"image": "<base64>"} in UTF-8'


def shown(text: object) -> str:
    """Client input quoted for a message: on one line, cut to `_SHOWN` characters."""
    text = str(text)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


@dataclass(slots=True)
class Parts:
    """Contents of a body: fields by name, and encoded images or a clip."""

    fields: dict[str, Any] = field(default_factory=dict)
    images: list[bytes] = field(default_factory=list)
    video: bytes | None = None

    def packed(self) -> bytes:
        """Encode for `unpacked`."""
        fields = json.dumps(self.fields)  # msgpack takes neither lone surrogates nor large numbers
        return msgpack.encode((fields, self.images, self.video))

    @classmethod
    def unpacked(cls, data: bytes) -> "Parts":
        """Decode the result of `packed`."""
        fields, images, video = msgpack.decode(data, type=tuple[str, list[bytes], bytes | None])
        return cls(json.loads(fields), images, video)


def media_type(header: str) -> tuple[str, str]:
    """Media type of a Content-Type in lower case, and a form's boundary. Raises InvalidRequest."""
    if len(header) > _CONTENT_TYPE:
        raise InvalidRequest(f"Content-Type is longer than {_CONTENT_TYPE} characters")
    kind, options = parse_options_header(header)
    boundary = str(options.get("boundary", ""))
    if kind == "multipart/form-data" and not (
        0 < len(boundary) <= _BOUNDARY and boundary.isascii() and boundary.isprintable()
    ):
        raise InvalidRequest(
            f"the multipart body can't be read: its Content-Type needs a boundary of 1 to "
            f"{_BOUNDARY} ASCII characters"
        )
    return kind, boundary


def read_form(body: bytes, boundary: str, found: Parts) -> Iterator[None]:
    """Add the parts of a form to `found`, yielding after each piece to let other requests run.

    Raises InvalidRequest naming the problem.
    """
    parser = PushMultipartParser(boundary, max_segment_count=_PARTS)
    segment: MultipartSegment | None = None
    content: list[bytes] = []
    try:
        with parser:
            for start in range(0, len(body), PIECE):
                for event in parser.parse(body[start : start + PIECE]):
                    if isinstance(event, MultipartSegment):
                        segment, content = event, []
                    elif event is None:
                        assert segment is not None
                        _keep(found, segment, b"".join(content))
                    else:
                        content.append(event)
                yield
    except (MultipartError, UnicodeError) as cause:
        raise InvalidRequest(
            f"the multipart body can't be read, check its boundary and headers: {shown(cause)}"
        ) from cause
    if not found.images and found.video is None:
        raise InvalidRequest("the form has no field 'image': add the image under that name")


def _keep(found: Parts, segment: MultipartSegment, content: bytes) -> None:
    name = segment.name
    if name == "image":
        found.images.append(content)
        return
    if name == "video":
        if found.video is not None:
            raise InvalidRequest("the field 'video' is given twice: send it once")
        found.video = content
        return
    if segment.filename is not None:
        raise InvalidRequest(f"unknown file field {shown(name)}: use the field 'image'")
    if len(content) > _TEXT:
        raise InvalidRequest(f"the field {shown(name)} is longer than {_TEXT} bytes")
    value = text(name, content)
    if name in found.fields and name == "prompt":  # one for each image
        before = found.fields[name]
        found.fields[name] = [*(before if isinstance(before, list) else [before]), value]
    elif name in found.fields:
        raise InvalidRequest(f"the field {shown(name)} is given twice: send it once")
    else:
        found.fields[name] = value


def text(name: str, value: bytes) -> str:
    """Decode a field's value from UTF-8. Raises InvalidRequest."""
    try:
        return value.decode()
    except UnicodeDecodeError as cause:
        raise InvalidRequest(f"{shown(name)} is not UTF-8") from cause


def json_parts(body: bytes) -> Parts:
    """Parse a JSON object, and decode the images in it (base64, or data URLs).

    Images may be in `image` (one, or a list), in `images` (each as it is, or as `image` of an
    object), or where other protocols put them: in `inputs`, `inputs.image`, the `data` of a tensor
    IMAGE in `inputs`, or `image_url.url` of a part of a message's content. Each is replaced by its
    index in the list of images; `image` by the number of images in it, and `video` by true.
    Raises InvalidRequest naming the problem.
    """
    outline, long = _outline(body)
    try:
        fields = json.loads(outline)
    except (ValueError, RecursionError) as cause:
        raise InvalidRequest(f"the body is not JSON: {_NO_OBJECT}") from cause
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the JSON is not an object: {_NO_OBJECT}")
    sent, clip = fields.get("image"), fields.get("video")
    several = [] if sent is None else sent if isinstance(sent, list) else [sent]
    places = list(_places(fields))
    if len(several) + len(places) > MOST_IMAGES:
        raise InvalidRequest(f"the JSON holds more than {MOST_IMAGES} images")
    images = [_from_base64(image, long) for image in several]
    for holder, key in places:
        images.append(_from_base64(holder[key], long))
        holder[key] = len(images) - 1
    left = {"image": len(several) if several else None, "video": True if clip else None}
    fields |= {name: value for name, value in left.items() if name in fields}
    _check_short(fields)
    return Parts(fields, images, None if clip is None else _from_base64(clip, long, "video"))


def _places(fields: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Container and key of each image outside `image`.

    Callers must refuse other values there: the numbers put in place are indices of images.
    """
    images = fields.get("images")
    for place, each in enumerate(images if isinstance(images, list) else []):
        if isinstance(each, dict):
            each.setdefault("image", None)
            yield each, "image"
        else:
            yield images, place
    inputs = fields.get("inputs")
    if isinstance(inputs, str | int | float):
        yield fields, "inputs"
    elif isinstance(inputs, dict) and "image" in inputs:
        yield inputs, "image"
    for tensor in inputs if isinstance(inputs, list) else []:
        if isinstance(tensor, dict) and tensor.get("name") == "IMAGE":
            yield from _texts(tensor.get("data"))
    messages = fields.get("messages")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            url = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(url, dict) and "url" in url and not _is_address(url["url"]):
                yield url, "url"


def _texts(data: Any, depth: int = 1) -> Iterator[tuple[Any, Any]]:
    """Container and index of each element of a tensor's data, nested or flat."""
    for place, each in enumerate(data if isinstance(data, list) and depth < _DEPTH else []):
        if isinstance(each, list):
            yield from _texts(each, depth + 1)
        else:
            yield data, place


def _is_address(url: Any) -> bool:
    """Whether the image is at a URL rather than in the body."""
    return isinstance(url, str) and not url.startswith(("data:", "\0"))


def _outline(body: bytes) -> tuple[bytes, list[bytes]]:
    """The JSON text with marks in place of its long strings, and those strings as written.

    A mark is a string of a zero character and an index; no string in the body may begin like that.
    """
    pieces: list[bytes] = []
    long: list[bytes] = []
    end = outside = quotes = 0
    while (start := body.find(b'"', end)) >= 0:
        outside += start - end
        close = start
        while quotes < _QUOTES:
            quotes += 1
            before, close = close, body.find(b'"', close + 1)
            if close < 0 or not _ends_escaping(body[before + 1 : close]):
                break
        if outside > _TEXT or quotes == _QUOTES or close < 0:
            break
        pieces.append(body[end:start])
        end = close + 1
        if end - start > _TEXT:
            pieces.append(_MARK + b'%d"' % len(long))
            long.append(body[start:end])
        elif body.startswith(_MARK, start):
            raise InvalidRequest("a text in the JSON begins with a zero character")
        else:
            pieces.append(body[start:end])
    outline = b"".join([*pieces, body[end:]])
    if outside + len(body) - end > _TEXT or len(outline) > _OUTLINE:
        raise InvalidRequest(
            f"the JSON is too large without its image: send at most {_QUOTES} strings of together "
            f"{_OUTLINE // 1024} KiB, and {_TEXT // 1024} KiB beside them"
        )
    return outline, long


def _ends_escaping(text: bytes) -> bool:
    """Whether a text ends with an odd number of backslashes, so that the next byte is escaped."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1


def _check_short(fields: dict[str, Any]) -> None:
    """Raise InvalidRequest for too many values or levels, or a long string that is no image."""
    waiting: list[tuple[Any, int]] = [(fields, 1)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        if depth > _DEPTH:
            raise InvalidRequest(f"the JSON is nested more than {_DEPTH} deep: {_NO_OBJECT}")
        if isinstance(value, dict | list):
            count += len(value)
            if count > _VALUES:
                raise InvalidRequest(f"the JSON holds more than {_VALUES} values: send fewer")
            waiting += [
                (inner, depth + 1)
                for inner in (value if isinstance(value, list) else (*value, *value.values()))
            ]
        elif isinstance(value, str) and value.startswith("\0"):
            raise InvalidRequest(f"the JSON holds a text of more than {_TEXT // 1024} KiB")


def _from_base64(image: Any, long: list[bytes], name: str = "image") -> bytes:
    """Decode an image or clip of a JSON body. Raises InvalidRequest."""
    if not isinstance(image, str):
        raise InvalidRequest(f"the field {name!r} is missing or not a string: send it as base64")
    try:
        if image.startswith("\0"):
            written = long[int(image[1:])]
            if written.count(b"\\") > len(written) // _UNESCAPED:
                raise ValueError("it is mostly escapes")
            image = json.loads(written) if b"\\" in written else written[1:-1].decode()
        if image.startswith("data:"):
            image = image.partition(",")[2]
        if not image.isascii():
            raise ValueError("it has other characters")  # translate is slow on them
        image = image.translate(_WHITESPACE)  # some programs break lines, as MIME does
        return base64.b64decode(image + "=" * (-len(image) % 4), validate=True)
    except (binascii.Error, ValueError, IndexError) as cause:
        raise InvalidRequest(f"the field {name!r} is not base64") from cause
