"""What an image will cost is known, and bounded, before it is decoded or even opened."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InvalidImage
from runtime.model.manifest import Preprocessing
from runtime.model.preprocess import FORMATS
from server.images import heads
from server.images.cost import estimate
from server.images.pool import _QUICK
from tests.support.decoders import HOW, expensive
from tests.support.paths import SAMPLES
from tests.support.tiffs import tiff


def _saved(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, kind, **options)
    return buffer.getvalue()


def _strips(count: int, *tags: tuple[int, int, int, bytes], data: bytes = b"") -> bytes:
    """A TIFF whose strips are all the same bytes."""
    depth = 258, 3, 3, struct.pack("<HHH", 8, 8, 8)
    return tiff(depth, (273, 4, count, struct.pack("<I", 8) * count), *tags, data=data)


JPEG, PNG, GIF = _saved("JPEG"), _saved("PNG"), _saved("GIF")


TABLE = 13 + (3 << ((GIF[10] & 7) + 1) if GIF[10] & 0x80 else 0)  # offset behind the colour table


CHUNK = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))


@pytest.mark.parametrize(
    "image",
    [
        JPEG[:2] + b"\xff\xed\x00\x02" * 50_000 + JPEG[2:],
        JPEG[:2] + b"\xff" * 100_000 + JPEG[2:],
        PNG[:33] + CHUNK * 50_000 + PNG[33:],
        GIF[:TABLE] + b"\x21\xfe\x01a\x00" * 50_000 + GIF[TABLE:],
        GIF[:TABLE] + b"\x21\xfe" + b"\x01a" * 50_000 + b"\x00" + GIF[TABLE:],
        b"II*\0" + struct.pack("<IH", 8, 20_000) + bytes(12) * 20_000,
        b"MM\0+" + struct.pack(">HHQQ", 8, 0, 16, 20_000) + bytes(20) * 20_000,
        _strips(200_000),
        _strips(200, (282, 5, 100_000, bytes(800_000))),
        _strips(200, *((tag, 7, 100_000, b"lies") for tag in range(40_000, 40_100))),
    ],
)
def test_an_image_of_thousands_of_parts_is_refused_unopened(image):
    with pytest.raises(InvalidImage, match="parts"):
        heads.check(image)


@pytest.mark.parametrize("frame", [0xC9, 0xCA])
def test_an_arithmetic_coded_jpeg_is_refused_as_such(frame):
    with pytest.raises(InvalidImage, match="arithmetic-coded"):
        heads.check(JPEG.replace(b"\xff\xc0", bytes([0xFF, frame]), 1))


def test_images_as_programs_write_them_have_few_parts():
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    for kind in FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        heads.check(buffer.getvalue())
    for path in SAMPLES.glob("*.png"):
        heads.check(path.read_bytes())
    heads.check(JPEG[:20])
    heads.check(b"")


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [("PNG", (1, 990), {}), ("TIFF", (16, 16), {"tiffinfo": {322: 4000, 323: 4000}})],
)
def test_what_a_small_image_becomes_is_estimated_too(kind, size, options):
    how = Preprocessing(224, 224, 3)
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    if options:
        image.tag_v2[322] = image.tag_v2[323] = 4000
        with pytest.raises(InvalidImage, match="tiles far larger"):
            estimate(image, buffer.getvalue(), how)
        image.tag_v2[322] = image.tag_v2[323] = 1000
    assert estimate(image, buffer.getvalue(), how).seconds > 0.015


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("PNG", "I;16", {}), ("PNG", "RGB", {"interlaced": True}),
     ("TIFF", "RGB", {"compression": "lzma"})],
)  # fmt: skip
def test_what_takes_longer_than_usual_in_its_format_is_estimated_so(kind, mode, options):
    """Sixteen bits, seven passes, a slow compression: of flat colour, which makes small files."""
    how, size = Preprocessing(224, 224, 3), (1200, 1200)

    def estimated(mode: str, interlaced: bool = False, **options) -> float:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, kind, **options)
        image = Image.open(buffer)
        if interlaced:
            image.info["interlace"] = 1  # Pillow reads interlaced files, and can't write them
        return estimate(image, buffer.getvalue(), how).seconds

    assert estimated(mode, **options) > 1.5 * estimated("RGB")


def test_the_strips_of_a_tiff_and_the_scans_of_their_jpegs_are_estimated():
    def seconds(image: bytes) -> float:
        return estimate(Image.open(io.BytesIO(image)), image, HOW).seconds

    assert seconds(_strips(20_000)) > 0.15 > seconds(_strips(200))
    jpeg, scans = (259, 3, 1, b"\7"), b"\xff\xda" * 90
    assert seconds(_strips(2, jpeg, data=scans)) > 2 * seconds(_strips(2, jpeg))


@pytest.mark.parametrize("rest", [{"exif": {0x0112: 6}}, {"mode": "CMYK"}])
def test_a_jpeg_costs_what_is_left_of_it_after_scaled_decoding(rest):
    """Thin ones, turned ones and those of four colours take ten times as long per pixel."""

    def seconds(size, mode="RGB", exif=()):
        buffer, written = io.BytesIO(), Image.Exif()
        written.update(exif)
        Image.new(mode, size).save(buffer, "JPEG", exif=written)
        return estimate(Image.open(buffer), buffer.getvalue(), HOW).seconds

    least = 3 * HOW.shortest_edge
    assert seconds((4000, 2 * least - 1)) > 3 * seconds((4000, 2 * least))
    assert seconds((4000, least), **rest) > 1.3 * seconds((4000, least))


def test_what_an_image_costs_is_seen_in_its_head():
    def seconds(image):
        return estimate(Image.open(io.BytesIO(image)), image, HOW).seconds

    photo = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).resize((4000, 3000)).save(photo, "JPEG")
    assert seconds(photo.getvalue()) < 0.15, "a camera's picture is a usual one"
    large, turned = Preprocessing(480, 480, 3), Image.Exif()
    turned[0x0112] = 6
    Image.open(photo).save(photo, "JPEG", exif=turned)
    image = Image.open(photo)
    assert estimate(image, photo.getvalue(), large).seconds < _QUICK, "a telephone's, too"
    assert seconds(expensive(4000)) > 0.15
    assert len(expensive(4000)) < 100
