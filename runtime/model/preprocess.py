"""Image bytes to the encoder's uint8 pixels, equal to the output of Hugging Face's processor.

One exception: libjpeg decodes a JPEG at least six times as large as the encoder needs at a half, a
quarter or an eighth of its size. The mean difference is then at most 1 of 255 levels for
photographs and at most 10 for grids and other fine drawings; 12 megapixels take about a third of
the time.

Three steps are left to the processor's caller: EXIF orientation is applied first, transparent
images are composited on white, and 16-bit images are scaled to 8 bits.
"""

import io
import struct
from typing import Literal

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from runtime.errors import InvalidImage, TooManyPixels
from runtime.model.manifest import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
JPEG = ("JPEG", "MPO")  # MPO is several JPEGs in one file, of which the first is decoded
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000
_SPARE = 3  # scaled decoding keeps at least so many times `shortest_edge`
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # per image; many images are decoded at a time

# Exceptions of Pillow's decoders on damaged files; any other exception is a bug and must show.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
          OverflowError, MemoryError, RuntimeError, AssertionError, struct.error)  # fmt: skip
# EXIF 2.32, 4.6.4: the transposition that undoes each orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SEPARATE = 2  # PlanarConfiguration of a TIFF: a plane for each colour
_SAMPLE_FORMAT, _SIGNED = 339, 2  # tag of a TIFF
_FEW_GREYS = {"L;2": 85, "L;4": 17}  # steps of a PNG's greys once they have 8 bits
_EXIF_ENTRIES, _EXIF_BYTES = 500, 2**18  # larger EXIF data is ignored
_NOT_AN_IMAGE = f"not an image: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"

_ODD_TIFF = "a TIFF of a kind that can't be read here: save it as PNG, or with 8 bits"
_TIFF = b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"


def preprocess(data: bytes, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded image -> uint8 `[3, crop, crop]` RGB.

    Raises InvalidImage for bytes that can't be decoded, TooManyPixels before decoding more than
    `max_pixels`.
    """
    return prepared(opened(data, max_pixels), how, max_pixels)


def scale_of(image: Image.Image, how: Preprocessing) -> int:
    """By how much an opened image is scaled down while it is decoded; 1 for all but large JPEGs."""
    fits = min(image.size) // (_SPARE * how.shortest_edge) if image.format in JPEG else 1
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(1, fits))


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes an image upright, if any."""
    # Only the orientation is read: Pillow's `exif_transpose` also rewrites the other tags, and
    # fails if it can't.
    turned = image.getexif().get(ExifTags.Base.Orientation) if _is_short(image) else None
    return _UPRIGHT.get(turned) if isinstance(turned, int) else None


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> upright RGB image (the first frame of an animation).

    Raises InvalidImage, or TooManyPixels before decoding.
    """
    return _upright(opened(data, max_pixels), None)


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> image with its header read; no pixel is decoded yet.

    Raises InvalidImage or TooManyPixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as cause:  # Pillow's own limit, where none has lifted it
        raise TooManyPixels(_too_many(max_pixels)) from cause
    except DAMAGE as cause:
        raise InvalidImage(_ODD_TIFF if data.startswith(_TIFF) else _NOT_AN_IMAGE) from cause
    if image.width * image.height > max_pixels:
        raise TooManyPixels(_too_many(max_pixels))
    return image


def prepared(image: Image.Image, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Opened image -> pixels as in `preprocess`. Raises InvalidImage or TooManyPixels."""
    return to_pixels(_upright(image, _SPARE * how.shortest_edge), how, max_pixels)


def _upright(image: Image.Image, least_edge: int | None) -> Image.Image:
    """Decode an opened image to RGB.

    least_edge: shortest edge in pixels that a scaled-down JPEG must keep; None decodes full size.
    """
    try:
        if isinstance(image, TiffImageFile):
            _check_tiff(image)
        if least_edge is not None:
            image.draft(None, (least_edge, least_edge))  # has no effect on other formats than JPEG
        _scale_clear_grey(image)
        image.load()
        turn = turn_of(image)
        if image.mode.startswith("I;16") and isinstance(image, TiffImageFile):
            image = _of_16_bits(image)
        return to_rgb(image if turn is None else image.transpose(turn))
    except DAMAGE as cause:
        raise InvalidImage(
            f"a damaged {image.format} image: its end is missing, or bytes were changed"
        ) from cause


def _scale_clear_grey(image: Image.Image) -> None:
    """Of a PNG of few greys Pillow scales the pixels to 8 bits, but not the one that is clear."""
    clear = image.info.get("transparency")
    if isinstance(image, PngImageFile) and isinstance(clear, int) and image.tile:
        image.info["transparency"] = clear * _FEW_GREYS.get(str(image.tile[0].args), 1)


def _check_tiff(image: TiffImageFile) -> None:
    """Raise InvalidImage for pixels that Pillow takes for others."""
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample, (1,))
    planes = image.tag_v2.get(ExifTags.Base.PlanarConfiguration, 1)
    raw = image.info.get("compression") == "raw"
    if raw and planes == _SEPARATE and len(bits) > 1 and max(bits) > 8:
        raise InvalidImage(
            "a TIFF of uncompressed planes of 16 bits can't be read here: save it with 8 bits, or "
            "compressed"
        )
    if _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ()) and max(bits) <= 16:  # 32 bits are checked
        raise InvalidImage("a TIFF of signed values can't be read here: save it with unsigned ones")


def _of_16_bits(image: TiffImageFile) -> Image.Image:
    """Values from black to white: Pillow leaves 12 bits as they are, and white may be zero."""
    values = np.asarray(image).astype(np.uint16)
    [bits] = image.tag_v2.get(ExifTags.Base.BitsPerSample, (16,))
    values = values << (16 - bits)
    if image.tag_v2.get(ExifTags.Base.PhotometricInterpretation, 0) == 0:
        values = 65535 - values
    return Image.fromarray(values)


def _is_short(image: Image.Image) -> bool:
    """Whether EXIF data is no longer than cameras write. (TIFF 6.0, 2: its first directory.)"""
    exif = image.info.get("exif", b"")
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"
    first = int.from_bytes(exif[4:8], order)
    entries = int.from_bytes(exif[first : first + 2], order)
    written = len(exif) + len(str(image.info.get("Raw profile type exif", "")))
    return entries <= _EXIF_ENTRIES and written <= _EXIF_BYTES


def _too_many(limit: int) -> str:
    return f"the image has too many pixels: send at most {limit / 1e6:g} million"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, 16 bits scaled to 8, CMYK and palettes converted.

    Raises InvalidImage for floating-point pixels, where 1 is white in some files and black in
    others, and for integers of more than 16 bits.
    """
    if image.mode == "F":
        raise InvalidImage(
            "the image has floating-point pixels, whose range is unknown: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, dtype=np.uint16)
        grey = (deep >> 8).astype(np.uint8)
        if isinstance(clear := image.info.get("transparency"), int):
            grey[deep == clear] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "I":  # 32-bit integers, holding 16-bit values in PNG, and mostly in TIFF
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise InvalidImage(
                "the image has 32-bit values, whose range is unknown: save it with 8 or 16 bits"
            )
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def resized(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """Width and height after resizing to `shortest_edge`, rounded as in CLIPImageProcessor."""
    width, height = size
    short, long = sorted(size)
    long = int(how.shortest_edge * long / short)
    return (how.shortest_edge, long) if width <= height else (long, how.shortest_edge)


def to_pixels(image: Image.Image, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """RGB image -> uint8 `[3, crop, crop]`: resize the shortest edge, crop the centre.

    Raises InvalidImage for an empty image, TooManyPixels if it has more once it is resized.
    """
    if not all(image.size):
        raise InvalidImage("the image is empty")
    size = resized(image.size, how)
    if size[0] * size[1] > max_pixels:  # resizing a line of pixels enlarges it a thousandfold
        raise TooManyPixels("the image is far longer than wide: crop it to what is to be captioned")
    if size != image.size:
        image = image.resize(size, Image.Resampling(how.resample))
    left, top = (size[0] - how.crop) // 2, (size[1] - how.crop) // 2
    image = image.crop((left, top, left + how.crop, top + how.crop))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
