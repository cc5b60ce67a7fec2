"""Pixels equal to Hugging Face's processor, for every kind of image that people send."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, VideoMAEImageProcessor

from runtime.errors import InvalidImage, TooManyPixels
from runtime.model.manifest import Preprocessing
from runtime.model.preprocess import FORMATS, decode, preprocess, to_rgb
from tests.support.tiffs import tiff

HOW = Preprocessing(shortest_edge=224, crop=224, resample=3)
RNG = np.random.default_rng(0)


def noise(width: int, height: int, bands: int = 3) -> np.ndarray:
    small = RNG.integers(0, 256, (height // 8 + 2, width // 8 + 2, bands), np.uint8)
    return np.repeat(np.repeat(small, 8, 0), 8, 1)[:height, :width]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def theirs(image: Image.Image, how: Preprocessing = HOW) -> np.ndarray:
    processor = CLIPImageProcessor(
        size={"shortest_edge": how.shortest_edge},
        crop_size={"height": how.crop, "width": how.crop},
        resample=how.resample,
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][
        0
    ]


@pytest.mark.parametrize(
    "size",
    [(640, 480), (480, 640), (224, 224), (225, 224), (224, 500), (1000, 333), (333, 1001), (30, 50),
     (1, 1), (1, 60), (97, 3)],
)  # fmt: skip
@pytest.mark.parametrize("edge", [224, 480, 128])
def test_equal_to_the_processor_at_any_size(size, edge):
    image = Image.fromarray(noise(*size))
    how = Preprocessing(edge, edge, 3)
    assert np.array_equal(preprocess(encoded(image), how), theirs(image, how))


def test_equal_to_the_video_processor():
    image = Image.fromarray(noise(320, 180))
    processor = VideoMAEImageProcessor(do_rescale=False, do_normalize=False)
    expected = processor([[image]], return_tensors="np")["pixel_values"][0][0]
    how = Preprocessing(224, 224, int(processor.resample))
    assert np.array_equal(preprocess(encoded(image), how), expected)


def test_a_crop_smaller_than_the_edge():
    image = Image.fromarray(noise(400, 300))
    how = Preprocessing(256, 224, 3)
    assert np.array_equal(preprocess(encoded(image), how), theirs(image, how))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind):
    data = encoded(Image.fromarray(noise(300, 260)), kind)
    assert np.array_equal(
        preprocess(data, HOW), theirs(Image.open(io.BytesIO(data)).convert("RGB"))
    )


def test_grey_palette_and_cmyk_are_converted():
    picture = Image.fromarray(noise(300, 260))
    for mode, kind in (
        ("L", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
    ):
        data = encoded(picture.convert(mode), kind)
        expected = theirs(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(preprocess(data, HOW), expected), (mode, kind)


def test_floating_point_pixels_are_refused():
    with pytest.raises(InvalidImage, match="save it with 8 or 16 bits"):
        preprocess(encoded(Image.new("F", (300, 200), 0.5), "TIFF"), HOW)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (300, 260), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 150, 260))
    left, right = preprocess(encoded(image.convert(mode)), HOW)[:, 112, [20, 200]].T
    assert right.tolist() == [255, 255, 255]
    assert left.max() < 255 or left.tolist() == [0, 0, 255]


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 300 * 260).reshape(260, 300).astype(np.uint16)
    expected = theirs(Image.fromarray((ramp >> 8).astype(np.uint8)).convert("RGB"))
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(preprocess(encoded(Image.fromarray(ramp), kind), HOW), expected)
    inverted = encoded(Image.fromarray(65535 - ramp), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(preprocess(inverted, HOW), expected)


def test_planes_of_sixteen_bits_are_refused_and_not_taken_for_pixels():
    depth, planes = (258, 3, 3, struct.pack("<HHH", 16, 16, 16)), (284, 3, 1, b"\2")
    offsets = 273, 4, 3, struct.pack("<III", 8, 8, 8)
    with pytest.raises(InvalidImage, match="planes of 16 bits can't be read"):
        preprocess(tiff(depth, offsets, planes, data=bytes(300 * 200 * 6)), HOW)


def test_twelve_bits_are_scaled_as_sixteen_are():
    ramp = np.linspace(0, 4095, 300 * 200).astype(np.uint32)
    first, second = ramp[::2], ramp[1::2]
    packed = np.stack([first >> 4, first << 4 & 0xF0 | second >> 8, second & 0xFF], 1)
    tags = (258, 3, 1, b"\x0c"), (262, 3, 1, b"\1"), (277, 3, 1, b"\1"), (278, 3, 1, b"\xc8")
    begin, size = 8 + 2 + 12 * 9 + 4, len(first) * 3
    strip = (273, 4, 1, struct.pack("<I", begin)), (279, 4, 1, struct.pack("<I", size))
    image = tiff(*tags, *strip, data=packed.astype(np.uint8).tobytes())
    expected = Image.fromarray((ramp >> 4).astype(np.uint8).reshape(200, 300)).convert("RGB")
    assert np.array_equal(preprocess(image, HOW), theirs(expected))


@pytest.mark.parametrize(
    ("image", "told"),
    [
        (encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF"), "32-bit values"),
        (tiff((258, 3, 1, b"\x08"), (262, 3, 1, b"\1"), (277, 3, 1, b"\1"), (339, 3, 1, b"\2"),
              (273, 4, 1, b"\x08")), "signed values"),
        (tiff((258, 3, 1, b"\x08"), (262, 3, 1, b"\x63")), "a TIFF of a kind"),
    ],
)  # fmt: skip
def test_values_of_unknown_range_and_unknown_tiffs_are_refused(image, told):
    with pytest.raises(InvalidImage, match=told):
        preprocess(image, HOW)


@pytest.mark.parametrize(("bits", "step"), [(2, 85), (4, 17)])
def test_the_clear_one_of_few_greys_is_found(bits, step):
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
    row = b"\0" + bytes([0b00011011 if bits == 2 else 0x01]) + bytes(bits - 1)  # ends in zeros
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", b"\0\1")
    found = decode(png + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b""))
    grey = [pixel[0] for pixel in found.getdata()]
    assert grey[1] == 255, "the clear one"
    assert grey[0] == 0 and set(grey) <= {0, 255, *(step * n for n in range(16))}


def test_a_transparent_colour_may_have_sixteen_bits():
    image = Image.new("RGB", (300, 200), (1, 2, 3))
    image.info["transparency"] = (1 << 8, 2 << 8 | 9, 3 << 8)
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_may_have_a_transparent_value():
    ramp = np.linspace(0, 65535, 300 * 260).reshape(260, 300).astype(np.uint16)
    seen = np.where(ramp == 0, 255, ramp >> 8).astype(np.uint8)
    clear = encoded(Image.fromarray(ramp), "PNG", transparency=0)
    assert np.array_equal(preprocess(clear, HOW), theirs(Image.fromarray(seen).convert("RGB")))


@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("tag", [0x0100, 0x010F, 0x0111, 0x8769, 0x8825, 0x927C, 0xA005])
def test_an_odd_tag_beside_the_orientation_harms_nothing(tag, kind):
    """Cameras and programs write all sorts of things; only the orientation is asked for."""
    tags = struct.pack("<HHII", tag, kind, 1, 8) + struct.pack("<HHII", 0x0112, 3, 1, 3)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + bytes(4)
    image = scenery(64, 48)
    turned = image.transpose(Image.Transpose.ROTATE_180)
    assert np.array_equal(preprocess(encoded(image, exif=exif), HOW), theirs(turned))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_comes_first(orientation):
    upright = Image.fromarray(noise(301, 200))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(preprocess(encoded(stored, exif=exif), HOW), theirs(upright))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (250, 250), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert preprocess(data, HOW)[:, 100, 100].tolist() == [255, 0, 0]


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%PDF-1.7", b"GIF89a"])
def test_what_is_no_image_is_named(data):
    with pytest.raises(InvalidImage, match="not an image"):
        decode(data)


def test_formats_that_are_not_listed_are_not_tried():
    with pytest.raises(InvalidImage, match="JPEG, PNG"):
        decode(encoded(Image.fromarray(noise(50, 50)), "PPM"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's warnings about TIFF tags
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_invalid_images_and_nothing_else(kind):
    whole = encoded(Image.fromarray(noise(120, 90)), kind)
    for cut in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        try:
            decode(whole[:cut])
        except InvalidImage:
            continue
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        try:
            decode(changed.tobytes())
        except (InvalidImage, TooManyPixels):
            continue


@pytest.mark.parametrize("size", [(7100, 7100), (20_000, 20_000)])
def test_too_many_pixels_are_refused_before_decoding(size):
    with pytest.raises(TooManyPixels, match="50 million"):
        decode(encoded(Image.new("1", size)))


def test_the_pixel_limit_is_a_setting():
    data = encoded(Image.new("RGB", (100, 100)))
    assert decode(data, max_pixels=10_000).size == (100, 100)
    with pytest.raises(TooManyPixels):
        decode(data, max_pixels=9_999)


@pytest.mark.parametrize("size", [(1, 100_000), (60_000, 2)])
def test_a_line_of_pixels_is_not_blown_up(size):
    with pytest.raises(TooManyPixels, match="far longer than wide"):
        preprocess(encoded(Image.new("1", size)), HOW)


def scenery(width: int, height: int) -> Image.Image:
    """An image of smooth areas, hard edges and thin lines, like a photograph."""
    coarse = Image.fromarray(noise(400, 300)).resize((40, 30))
    picture = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
    picture[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 0)
    picture[:: height // 30] = 0
    return Image.fromarray(picture)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((640, 480), False), ((1300, 1900), False), ((2000, 1500), True), ((4000, 3000), True)],
)
def test_large_jpegs_are_decoded_smaller_within_the_stated_tolerance(size, scaled):
    data = encoded(scenery(*size), "JPEG", quality=90)
    exact = theirs(Image.open(io.BytesIO(data))).astype(int)
    difference = np.abs(preprocess(data, HOW).astype(int) - exact)
    assert (difference.max() > 0) == scaled
    assert difference.mean() <= 1
    assert np.percentile(difference, 99.9) <= 12


def test_even_a_grid_stays_within_the_stated_tolerance():
    grid = np.full((1400, 1400, 3), 255, np.uint8)
    grid[::9], grid[:, ::9] = (200, 0, 0), (0, 0, 200)
    data = encoded(Image.fromarray(grid), "JPEG", quality=90)
    exact = theirs(Image.open(io.BytesIO(data))).astype(int)
    difference = np.abs(preprocess(data, HOW).astype(int) - exact)
    assert 0 < difference.mean() <= 10


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_decoding_keeps_orientation_and_colours(mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    data = encoded(scenery(2400, 1800).convert(mode), "JPEG", quality=95, exif=exif)
    upright = Image.open(io.BytesIO(data)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert np.abs(preprocess(data, HOW).astype(int) - theirs(upright)).mean() <= 1


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_thousands_of_tags_are_not_read(kind):
    """No camera writes them, and reading them takes a third of a second."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)
    tags += b"".join(struct.pack("<HHII", 0x9000 + n, 4, 1, n) for n in range(20_000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 20_001) + tags + bytes(4)
    image = scenery(64, 48)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(image, kind, exif=exif, **options)
    assert np.array_equal(preprocess(data, HOW), theirs(image))
