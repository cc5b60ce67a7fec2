"""Parses multipart forms, piece by piece."""

from collections.abc import Iterator

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from runtime.errors import InvalidRequest
from server.requests.parts import MOST_TEXT, Parts, shown, text

PIECE = 64 * 1024  # bytes of a form parsed at a time: a millisecond at most
_CONTENT_TYPE = 512  # characters of the header
_BOUNDARY = 70  # characters, by RFC 2046
_PARTS = 64  # most parts of a form


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
    if len(content) > MOST_TEXT:
        raise InvalidRequest(f"the field {shown(name)} is longer than {MOST_TEXT} bytes")
    value = text(name, content)
    if name in found.fields and name == "prompt":  # one for each image
        before = found.fields[name]
        found.fields[name] = [*(before if isinstance(before, list) else [before]), value]
    elif name in found.fields:
        raise InvalidRequest(f"the field {shown(name)} is given twice: send it once")
    else:
        found.fields[name] = value
