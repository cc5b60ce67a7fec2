"""Image bytes to the encoder's uint8 pixels, equal to what Hugging Face's image processor makes.

One exception: a JPEG at least six times as large as the encoder needs is decoded at a half, a
quarter or an eighth of its size, which libjpeg does on the way. The pixels of photographs then
differ by at most 1 of 255 levels in the mean, of grids and other fine drawings by at most 10; 12
megapixels take about a third of the time.

Three things are decided here because the processor leaves them to its caller: EXIF orientation is
applied first, transparent images are laid on white, and 16-bit ones are scaled to 8 bits.
"""

import io
import struct
from typing import Literal

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image

from runtime.errors import InvalidImage, TooManyPixels
from runtime.model.manifest import Preprocessing

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000
_SPARE = 3  # a scaled decoding keeps so many times the shortest edge that is wanted
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # of each image; many are decoded at a time
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns where ours refuses, and can't be raised

# What Pillow's decoders raise on damaged files; anything else is a bug and must show.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError,
           OverflowError, MemoryError, RuntimeError, struct.error)  # fmt: skip
# EXIF 2.32, 4.6.4: what each orientation takes to be undone.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_EXIF_ENTRIES, _EXIF_BYTES = 500, 2**18  # more is not looked at
_NOT_AN_IMAGE = f"not an image: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"


def preprocess(data: bytes, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded image -> uint8 `[3, crop, crop]` RGB.

    Raises InvalidImage for bytes that can't be decoded, TooManyPixels before decoding more than
    `max_pixels`.
    """
    return prepared(opened(data, max_pixels), how, max_pixels)


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> upright RGB image (the first frame of an animation).

    Raises InvalidImage, or TooManyPixels before decoding.
    """
    return _upright(opened(data, max_pixels), None)


def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> what its head says of it; nothing is decoded yet.

    Raises InvalidImage or TooManyPixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _DAMAGE as cause:
        raise InvalidImage(_NOT_AN_IMAGE) from cause
    if image.width * image.height > max_pixels:
        raise TooManyPixels(_too_many(max_pixels))
    return image


def prepared(image: Image.Image, how: Preprocessing, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Opened image -> pixels as of `preprocess`. Raises InvalidImage or TooManyPixels."""
    image = _upright(image, _SPARE * how.shortest_edge)
    width, height = resized(image.size, how)
    if width * height > max_pixels:  # a line of pixels grows a thousandfold when it is resized
        raise TooManyPixels("the image is far longer than wide: crop it to what is to be captioned")
    return to_pixels(image, how)


def _upright(image: Image.Image, least_edge: int | None) -> Image.Image:
    """Decode an opened image to RGB.

    least_edge: how small the shortest edge of a JPEG may come out, in pixels; None keeps its size.
    """
    try:
        if least_edge is not None:
            image.draft(None, (least_edge, least_edge))  # does nothing for what is no JPEG
        image.load()
        # Of all that EXIF says this alone; Pillow's own `exif_transpose` writes the rest anew, and
        # fails where it can't.
        turned = image.getexif().get(ExifTags.Base.Orientation) if _is_short(image) else None
        how = _UPRIGHT.get(turned) if isinstance(turned, int) else None
        return to_rgb(image if how is None else image.transpose(how))
    except _DAMAGE as cause:
        raise InvalidImage(
            f"a damaged {image.format} image: its end is missing, or bytes were changed"
        ) from cause


def _is_short(image: Image.Image) -> bool:
    """Whether EXIF is as long as cameras write it. (TIFF 6.0, 2: its first directory.)"""
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
    """Any mode to RGB: transparency on white, 16 bits scaled to 8, CMYK and palettes converted."""
    if image.mode.startswith("I;16"):
        deep = np.asarray(image, dtype=np.uint16)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":  # 32-bit integers; they hold 16-bit values in PNG, and mostly in TIFF
        deep = np.clip(np.asarray(image), 0, 65535)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        return Image.alpha_composite(white, seen).convert("RGB")
    return image.convert("RGB")


def resized(size: tuple[int, int], how: Preprocessing) -> tuple[int, int]:
    """Width and height with the shortest edge as wanted, rounded as CLIPImageProcessor does."""
    width, height = size
    short, long = sorted(size)
    long = int(how.shortest_edge * long / short)
    return (how.shortest_edge, long) if width <= height else (long, how.shortest_edge)


def to_pixels(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """RGB image -> uint8 `[3, crop, crop]`: shortest edge resized, centre cut out."""
    size = resized(image.size, how)
    if size != image.size:
        image = image.resize(size, Image.Resampling(how.resample))
    left, top = (size[0] - how.crop) // 2, (size[1] - how.crop) // 2
    image = image.crop((left, top, left + how.crop, top + how.crop))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
