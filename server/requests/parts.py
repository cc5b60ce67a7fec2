"""What a request's body holds, whichever its format."""

import json
from dataclasses import dataclass, field
from typing import Any

from msgspec import msgpack

from runtime.errors import InvalidRequest

MOST_IMAGES = 64  # per request
MOST_TEXT = 16 * 1024  # bytes of a field other than an image, and of JSON outside strings
_SHOWN = 100  # characters of client input repeated in a message


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


def shown(text: object) -> str:
    """Client input quoted for a message: on one line, cut to `_SHOWN` characters."""
    text = str(text)
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "…")


def text(name: str, value: bytes) -> str:
    """Decode a field's value from UTF-8. Raises InvalidRequest."""
    try:
        return value.decode()
    except UnicodeDecodeError as cause:
        raise InvalidRequest(f"{shown(name)} is not UTF-8") from cause
