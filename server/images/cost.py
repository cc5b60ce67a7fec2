"""Cost of decoding an image, estimated from its header before it is decoded.

The figures are upper bounds over photographs, noise and flat colour, on one core of a slow machine
(2 GHz Zen): they need only tell expensive images from usual ones.
"""

from dataclasses import dataclass

from PIL import Image, TiffImagePlugin

from runtime.errors import InvalidImage, VignetteError
from runtime.model.manifest import Preprocessing
from runtime.model.preprocess import DAMAGE, JPEG, resized, scale_of, turn_of

_BYTES = 20  # per pixel while it is decoded and converted: the codec's, Pillow's, and a copy
_SCANS = 100  # most of a JPEG; cameras and programs write about ten, libjpeg itself takes 500
_SCAN = 0.6  # ns per pixel and scan: each scan visits the coefficients again
_JPEG_PIXEL, _TURNED, _CMYK = 16, 8, 10  # ns per pixel that is left by scaled decoding
_RESIZED, _RESIZED_BYTES = 6, 4  # ns and bytes per pixel of the resized image, before cropping
_STRIPS, _TILES = 273, 324  # tags of a TIFF
_TILE_SIDES, _LARGE_TILE = (322, 323), 2**20  # tags; pixels of a tile that any image may have
_SLOW_DECODER, _SLOW_BYTE = "bmp_rle", 1000  # Pillow has it in Python; ns per byte
_PART = 15_000  # ns for a strip or tile of a TIFF
_PLAIN_SCANS = 6  # most of a non-progressive JPEG: four colours at most, and thumbnails
_DEEP, _INTERLACED, _LZMA = 2.7, 2.7, 3.5  # factors on the usual time per pixel
_START_OF_SCAN = b"\xff\xda"


class TooHard(VignetteError):
    """Decoding this image takes, or would take, too long or too much memory."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Cost of a format in ns: per pixel whatever its content, per byte of the file, and the most
    that bytes can add per pixel.
    """

    pixel: float
    byte: float
    most: float


_FORMATS = {
    **dict.fromkeys(JPEG, Rates(1, 20, 12)),
    "PNG": Rates(24, 40, 50),
    "WEBP": Rates(20, 350, 70),
    "AVIF": Rates(18, 330, 75),
    "GIF": Rates(14, 20, 10),
    "BMP": Rates(14, 0, 0),
    "TIFF": Rates(16, 10, 15),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Core seconds, and peak bytes of memory."""

    seconds: float
    memory: int


def scans_of(data: bytes) -> int:
    """Number of scans of a JPEG, its thumbnail's included. Raises InvalidImage if there are more
    than any program writes.
    """
    scans = data.count(_START_OF_SCAN)
    if scans > _SCANS:
        raise InvalidImage(
            f"this JPEG has {scans} scans, and at most {_SCANS} are decoded: save it again"
        )
    return scans


def estimate(image: Image.Image, data: bytes, how: Preprocessing) -> Cost:
    """The cost of an image that was opened but not decoded; `data` is its file.

    Raises InvalidImage for a JPEG with more scans than any program writes, and for a TIFF whose
    tiles are far larger than the image.
    """
    pixels = max(image.width * image.height, _tile(image))
    width, height = resized(image.size, how)
    rates = _FORMATS[str(image.format)]
    spent = pixels * rates.pixel * _slower(image) + min(len(data) * rates.byte, pixels * rates.most)
    spent += width * height * _RESIZED
    if any(tile[0] == _SLOW_DECODER for tile in getattr(image, "tile", ())):
        spent += len(data) * _SLOW_BYTE
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        spent += _strips(image, data)
    if image.format in JPEG:
        left = _JPEG_PIXEL + (_TURNED if _is_turned(image) else 0)
        left += _CMYK if image.mode == "CMYK" else 0
        spent += pixels / scale_of(image, how) ** 2 * left
        scans = scans_of(data)
        if "progressive" in image.info or scans > _PLAIN_SCANS:
            spent += pixels * scans * _SCAN
    return Cost(spent / 1e9, pixels * _BYTES + width * height * _RESIZED_BYTES)


def _is_turned(image: Image.Image) -> bool:
    try:
        return turn_of(image) is not None
    except DAMAGE:  # which decoding tells of
        return False


def _strips(image: TiffImagePlugin.TiffImageFile, data: bytes) -> float:
    """Nanoseconds for the strips or tiles of a TIFF, and for the scans of its JPEGs."""
    places = image.tag_v2.get(_TILES) or image.tag_v2.get(_STRIPS) or ()
    spent = float(len(places) * _PART)
    if image.info.get("compression") == "jpeg":
        apart = len(places) if len(set(places)) == len(places) else 1  # all may be the longest
        spent += image.width * image.height * data.count(_START_OF_SCAN) / max(1, apart) * _SCAN
    return spent


def _slower(image: Image.Image) -> float:
    """Factor on the usual time per pixel of the image's format."""
    factor = 1.0
    if image.format == "PNG":
        raw = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
        factor *= _DEEP if "16B" in raw else 1
        factor *= _INTERLACED if image.info.get("interlace") else 1
    elif image.format == "TIFF":
        factor *= _LZMA if image.info.get("compression") in ("lzma", "zstd") else 1
    return factor


def _tile(image: Image.Image) -> int:
    """Pixels of a TIFF's tile, which is decoded whole; 0 for other images."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    sides = [image.tag_v2.get(tag, 0) for tag in _TILE_SIDES]
    if not all(isinstance(side, int) for side in sides):
        raise InvalidImage("a damaged TIFF image: its tiles have no size")
    if sides[0] * sides[1] > _LARGE_TILE + 4 * image.width * image.height:
        raise InvalidImage("a TIFF of tiles far larger than the image: save it again")
    return sides[0] * sides[1]
