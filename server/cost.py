"""What decoding an image will take, estimated from its head before it is decoded.

The figures are upper bounds over photographs, noise and flat colour, on one core of a slow machine
(2 GHz Zen): it is enough that dear images are told from usual ones.
"""

from dataclasses import dataclass

from PIL import Image

from runtime.errors import InvalidImage, VignetteError

_BYTES = 20  # of a pixel while it is decoded and converted: the decoder's, Pillow's, and a copy
_SCANS = 100  # of a JPEG; cameras and programs write about ten, libjpeg itself takes 500
_SCAN = 0.6  # ns for a pixel and scan: coefficients are visited again in each
_PLAIN_SCANS = 6  # of a picture that is not progressive: four colours at most, and thumbnails
_START_OF_SCAN = b"\xff\xda"


class TooHard(VignetteError):
    """Decoding this image took too long or too much memory, or would."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a format, in ns: for a pixel whatever it shows, for a byte of the file, and how much
    bytes can add for a pixel at most.
    """

    pixel: float
    byte: float
    most: float


_JPEG = ("JPEG", "MPO")  # MPO is several JPEGs in one file, of which the first is decoded
_FORMATS = {
    **dict.fromkeys(_JPEG, Rates(2, 25, 12)),
    "PNG": Rates(24, 40, 50),
    "WEBP": Rates(20, 350, 70),
    "AVIF": Rates(18, 330, 75),
    "GIF": Rates(14, 20, 10),
    "BMP": Rates(14, 0, 0),
    "TIFF": Rates(16, 10, 15),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a core, and bytes of memory at the worst moment."""

    seconds: float
    memory: int


def estimate(image: Image.Image, data: bytes) -> Cost:
    """Of an image that was opened and not yet decoded; `data` is its file.

    Raises InvalidImage for a JPEG with more scans than any program writes.
    """
    pixels = image.width * image.height
    rates = _FORMATS[str(image.format)]
    spent = pixels * rates.pixel + min(len(data) * rates.byte, pixels * rates.most)
    if image.format in _JPEG:
        scans = data.count(_START_OF_SCAN)  # a thumbnail in it has some, too
        if scans > _SCANS:
            raise InvalidImage(
                f"this JPEG has {scans} scans, and at most {_SCANS} are decoded: save it again"
            )
        if "progressive" in image.info or scans > _PLAIN_SCANS:
            spent += pixels * scans * _SCAN
    return Cost(spent / 1e9, pixels * _BYTES)
