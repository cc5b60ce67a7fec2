"""Bounds on the number of parts of an image file, checked before Pillow opens it.

Pillow walks through the parts of a file one by one, in Python, before anything is known of the
image: a file of millions of empty parts takes many seconds to open.
"""

from typing import Literal

from runtime.errors import InvalidImage

_PARTS = 1000  # most before the image data; a PNG may have one more per `_PIECE`
_PIECE = 2048  # bytes
_PACKED, _MOST_PACKED = (b"iCCP", b"zTXt", b"iTXt"), 16  # chunks that unpack to a megabyte each
_KEYWORD = 80  # bytes of a keyword and its end
_PADDING = 64  # most bytes of 0xFF before a JPEG's marker
_JPEG, _PNG, _GIF = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", (b"GIF87a", b"GIF89a")
_TIFF, _BIG_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), 43
_TIFF_STRIPS, _STRIPS = (273, 279, 324, 325), 2**15  # tags; most strips or tiles: a row each
# Bytes of a value, by its type; types that Pillow makes objects of.
_TIFF_BYTES = dict(enumerate((1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4), 1)) | {16: 8}
_FRACTIONS = (5, 10)
_SCAN, _END, _ALONE = 0xDA, 0xD9, (0x01, *range(0xD0, 0xD9))  # markers of JPEG
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


def check(data: bytes) -> None:
    """Raise InvalidImage for a file that has far more parts than any program writes, and for an
    arithmetic-coded JPEG, of which Pillow reads small ones only, in two to three times the time.

    Other damage is left to Pillow.
    """
    if data.startswith(_JPEG):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(_GIF):
        _check_gif(data)
    elif data.startswith(_TIFF):
        _check_tiff(data)


def _too_many() -> InvalidImage:
    return InvalidImage("an image of thousands of parts, such as comments: save it again")


def _check_jpeg(data: bytes) -> None:
    """ITU-T T.81, annex B: segments of a marker and a length, up to the first scan."""
    place = 2
    for _ in range(_PARTS):
        padding = data[place : place + _PADDING]
        place += len(padding) - len(padding.lstrip(b"\xff"))
        marker = data[place : place + 1]
        if not marker or marker[0] in (_SCAN, _END):
            return
        if marker == b"\xff":
            break
        if marker[0] in _ARITHMETIC:
            raise InvalidImage("an arithmetic-coded JPEG, which is not read here: save it again")
        place += 1
        if marker[0] not in _ALONE:
            place += int.from_bytes(data[place : place + 2], "big")
        if data[place : place + 1] != b"\xff":
            found = data.find(b"\xff", place, place + _PIECE)  # like Pillow, skip other bytes
            if found < 0:
                return
            place = found
    raise _too_many()


def _check_png(data: bytes) -> None:
    """ISO/IEC 15948, 5.3: chunks of a length, a type, data and a checksum, up to the end."""
    place, packed = len(_PNG), 0
    for _ in range(_PARTS + len(data) // _PIECE):
        head = data[place : place + 8]
        if len(head) < 8 or head[4:] == b"IEND":
            return
        packed += head[4:] in _PACKED and _is_packed(data, place)
        if packed > _MOST_PACKED:
            break
        place += 12 + int.from_bytes(head[:4], "big")
    raise _too_many()


def _is_packed(data: bytes, place: int) -> bool:
    """Whether a chunk's data are compressed: of an iTXt a flag behind the keyword tells."""
    if data[place + 4 : place + 8] != b"iTXt":
        return True
    flag = data.find(b"\0", place + 8, place + 8 + _KEYWORD) + 1
    return data[flag : flag + 1] != b"\0"


def _check_tiff(data: bytes) -> None:
    """TIFF 6.0, 2: a directory of tags, each with a type, a count, and that many values; BigTIFF
    counts in eight bytes.
    """
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    big = int.from_bytes(data[2:4], order) == _BIG_TIFF
    first = int.from_bytes(data[8:16] if big else data[4:8], order)
    digits, length = (8, 20) if big else (2, 12)  # bytes of the number of tags, and of a tag
    tags = int.from_bytes(data[first : first + digits], order)
    if tags > _PARTS:
        raise _too_many()
    size = 0
    for place in range(first + digits, first + digits + tags * length, length):
        tag, kind = (int.from_bytes(data[at : at + 2], order) for at in (place, place + 2))
        count = int.from_bytes(data[place + 4 : place + (12 if big else 8)], order)
        size += count * _TIFF_BYTES.get(kind, 0)
        many_strips = tag in _TIFF_STRIPS and count > _STRIPS
        if many_strips or (kind in _FRACTIONS and count > _PARTS):
            raise _too_many()
    if size > 2 * len(data) + _PIECE:  # values that lie over each other
        raise _too_many()


def _check_gif(data: bytes) -> None:
    """GIF89a, 15 to 26: extensions of blocks with a length each, up to the first image."""
    place = 13
    if data[10:11] and data[10] & 0x80:
        place += 3 << ((data[10] & 7) + 1)
    for _ in range(_PARTS):
        if data[place : place + 1] != b"!":
            return
        place += 2
        for _ in range(_PARTS):
            size = data[place : place + 1]
            place += 1
            if not size or not size[0]:
                break
            place += size[0]
        else:
            break
    raise _too_many()
