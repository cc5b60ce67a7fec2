"""Untrusted protobuf messages, checked before they are parsed.

A message of two bytes becomes a Python object of a hundred, and parsing holds up the event loop:
so a call's fields and bytes are counted first. https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError

from runtime.errors import InvalidRequest
from server.grpc.stubs import grpc_service_pb2 as pb

_FIELDS, _BESIDE = 1024, 64 * 1024  # of a call; bytes besides its images
_DEEPEST = 4
_CALL = pb.ModelInferRequest.DESCRIPTOR
_IMAGES = {  # fields that may hold them
    _CALL.fields_by_name["raw_input_contents"].full_name,
    pb.InferTensorContents.DESCRIPTOR.fields_by_name["bytes_contents"].full_name,
}
_MOST_ID = 256  # characters: every answer repeats the id


def call_in(data: bytes) -> Any:
    """Parse a ModelInferRequest. Raises InvalidRequest if it is malformed or exceeds a limit."""
    left = [_FIELDS, _BESIDE]
    _count(memoryview(data), _CALL, left, _DEEPEST)
    call = pb.ModelInferRequest()
    try:
        call.ParseFromString(data)
    except DecodeError:
        raise InvalidRequest("the message is no ModelInferRequest") from None
    if len(call.id) > _MOST_ID:
        raise InvalidRequest(f"id must have {_MOST_ID} characters or less")
    return call


def _count(data: memoryview, kind: Any, left: list[int], depth: int) -> None:
    """Subtract a message's fields and non-image bytes from `left`. Raises InvalidRequest."""
    for number, content in _fields(data):
        left[0] -= 1
        field = kind.fields_by_number.get(number) if kind is not None else None
        below = field.message_type if field is not None else None
        if below is None and not (field is not None and field.full_name in _IMAGES):
            left[1] -= len(content)
        if left[0] < 0 or left[1] < 0 or depth == 0:
            raise InvalidRequest(
                f"a call holds {_FIELDS} fields and {_BESIDE // 1024} KiB beside its images at most"
            )
        if below is not None:
            _count(content, below, left, depth - 1)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; the content of a numeric field is empty."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:  # a varint
                _, at = _varint(data, at)
                content = data[at:at]
            case 1:  # 8 bytes
                at, content = at + 8, data[at:at]
            case 5:  # 4 bytes
                at, content = at + 4, data[at:at]
            case 2:  # length-delimited
                size, at = _varint(data, at)
                content = data[at : at + size]
                at += size
            case _:
                raise InvalidRequest("the message is no ModelInferRequest")
        if at > len(data):
            raise InvalidRequest("the message is no ModelInferRequest")
        yield tag >> 3, content


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at `at`, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise InvalidRequest("the message is no ModelInferRequest")
