"""Parses JSON bodies within bounds on their contents.

Only images may be large. That is checked before any object is built: strings are located first, and
short marks replace long ones in the text that is parsed.
"""

import base64
import binascii
import json
from collections.abc import Iterator
from typing import Any

from runtime.errors import InvalidRequest
from server.requests.parts import MOST_IMAGES, MOST_TEXT, Parts

_OUTLINE = 64 * 1024  # bytes of a JSON document without its images
_SMALL_IMAGE = 256  # bytes of a string that may be one, where many together are large
_QUOTES = 1024  # quotes of a JSON document that end a string or are escaped in one
_DEPTH, _VALUES = 8, 512  # levels of nesting, and values, of a JSON document
_UNESCAPED = 16  # fewest base64 characters per escape: some programs escape each "/" or "+"
_MARK = b'"\\u0000'  # start of a mark for a long string, whose index follows
_DATA = "data:"
_WHITESPACE = str.maketrans("", "", " \t\r\n")
_NO_OBJECT = 'send {"image": "<base64>"} in UTF-8'


def json_parts(body: bytes) -> Parts:
    """Parse a JSON object, and decode the images in it (base64, or data URLs).

    Images may be in `image` (one, or a list), in `images` (each as it is, or as `image` of an
    object), or where other protocols put them: in `inputs`, `inputs.image`, the `data` of a tensor
    IMAGE in `inputs`, or `image_url.url` of a part of a message's content. Each is replaced by its
    index in the list of images; `image` by the number of images in it, and `video` by true.
    Raises InvalidRequest naming the problem.
    """
    outline, long = _outline(body, MOST_TEXT)
    if len(outline) > _OUTLINE:
        outline, long = _outline(body, _SMALL_IMAGE)
    if len(outline) > _OUTLINE:
        raise _too_large()
    try:
        fields = json.loads(outline.decode("utf-8-sig"))  # of bytes it would take UTF-16, too
    except (ValueError, RecursionError) as cause:
        raise InvalidRequest(f"the body is not JSON: {_NO_OBJECT}") from cause
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the JSON is not an object: {_NO_OBJECT}")
    sent, clip = fields.get("image"), fields.get("video")
    several = [] if sent is None else sent if isinstance(sent, list) else [sent]
    places = list(_places(fields, long))
    if len(several) + len(places) > MOST_IMAGES:
        raise InvalidRequest(f"the JSON holds more than {MOST_IMAGES} images")
    images = [_from_base64(image, long) for image in several]
    for holder, key in places:
        images.append(_from_base64(holder[key], long))
        holder[key] = len(images) - 1
    left = {"image": len(several) if several else None, "video": True if clip else None}
    fields |= {name: value for name, value in left.items() if name in fields}
    _put_back(fields, long, _OUTLINE - len(outline))
    return Parts(fields, images, None if clip is None else _from_base64(clip, long, "video"))


def _places(fields: dict[str, Any], long: list[bytes]) -> Iterator[tuple[Any, Any]]:
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
            if isinstance(url, dict) and "url" in url and not _is_address(url["url"], long):
                yield url, "url"


def _texts(data: Any, depth: int = 1) -> Iterator[tuple[Any, Any]]:
    """Container and index of each element of a tensor's data, nested or flat."""
    for place, each in enumerate(data if isinstance(data, list) and depth < _DEPTH else []):
        if isinstance(each, list):
            yield from _texts(each, depth + 1)
        else:
            yield data, place


def _is_address(url: Any, long: list[bytes]) -> bool:
    """Whether the image is at a URL rather than in the body."""
    if not isinstance(url, str):
        return False
    if url.startswith("\0"):
        written = long[int(url[1:])]
        return len(written) <= MOST_TEXT and written[: len(_DATA) + 1].lower() != b'"data:'
    return not _is_data(url)


def _is_data(url: str) -> bool:
    return url[: len(_DATA)].lower() == _DATA


def _outline(body: bytes, longest: int) -> tuple[bytes, list[bytes]]:
    """The JSON text with marks in place of strings longer than `longest`, and those as written.

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
        if outside > MOST_TEXT or quotes == _QUOTES:
            raise _too_large()
        if close < 0:  # the string does not end, which parsing will say
            break
        pieces.append(body[end:start])
        end = close + 1
        if end - start > longest:
            pieces.append(_MARK + b'%d"' % len(long))
            long.append(body[start:end])
        elif body.startswith(_MARK, start):
            raise InvalidRequest("a text in the JSON begins with a zero character")
        else:
            pieces.append(body[start:end])
    if outside + len(body) - end > MOST_TEXT:
        raise _too_large()
    return b"".join([*pieces, body[end:]]), long


def _too_large() -> InvalidRequest:
    return InvalidRequest(
        f"the JSON is too large without its image: send at most {_QUOTES} strings of together "
        f"{_OUTLINE // 1024} KiB, and {MOST_TEXT // 1024} KiB beside them"
    )


def _ends_escaping(text: bytes) -> bool:
    """Whether a text ends with an odd number of backslashes, so that the next byte is escaped."""
    return (len(text) - len(text.rstrip(b"\\"))) % 2 == 1


def _put_back(fields: dict[str, Any], long: list[bytes], room: int) -> None:
    """Put strings that are no images back in place of their marks; `room`: their most bytes.

    Raises InvalidRequest for too many values or levels, or too long strings.
    """
    waiting: list[tuple[Any, int]] = [(fields, 1)]
    count = 0
    while waiting:
        value, depth = waiting.pop()
        if depth + bool(value) > _DEPTH:
            raise InvalidRequest(f"the JSON is nested more than {_DEPTH} deep: {_NO_OBJECT}")
        count += len(value)
        if count > _VALUES:
            raise InvalidRequest(f"the JSON holds more than {_VALUES} values: send fewer")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, dict | list):
                waiting.append((inner, depth + 1))
            for text in (key, inner):
                if not (isinstance(text, str) and text.startswith("\0")):
                    continue
                written = long[int(text[1:])]
                room -= len(written)
                if len(written) > MOST_TEXT:
                    kib = MOST_TEXT // 1024
                    raise InvalidRequest(f"the JSON holds a text of more than {kib} KiB")
                if room < 0 or text is key:  # no field has a name as long as an image
                    raise _too_large()
                value[key] = _read(written)


def _read(written: bytes) -> Any:
    """The value of a string as written in JSON. Raises InvalidRequest."""
    try:
        return json.loads(written.decode())
    except ValueError as cause:
        raise InvalidRequest(f"the body is not JSON: {_NO_OBJECT}") from cause


def _from_base64(image: Any, long: list[bytes], name: str = "image") -> bytes:
    """Decode an image or clip of a JSON body. Raises InvalidRequest."""
    if not isinstance(image, str):
        raise InvalidRequest(f"the field {name!r} is missing or not a string: send it as base64")
    try:
        if image.startswith("\0"):
            written = long[int(image[1:])]
            if written.count(b"\\") > len(written) // _UNESCAPED:
                raise ValueError("it is mostly escapes")
            image = json.loads(written.decode()) if b"\\" in written else written[1:-1].decode()
        if _is_data(image):
            image = image.partition(",")[2]
        if not image.isascii():
            raise ValueError("it has other characters")  # translate is slow on them
        image = image.translate(_WHITESPACE)  # some programs break lines, as MIME does
        return base64.b64decode(image + "=" * (-len(image) % 4), validate=True)
    except (binascii.Error, ValueError, IndexError) as cause:
        raise InvalidRequest(f"the field {name!r} is not base64") from cause
