"""The forms in which a program gives images to an engine."""

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.async_engine import AsyncEngine
from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels
from tests.support.fakes import fake_engine, image
from tests.support.paths import SAMPLES


def test_images_may_be_paths_arrays_and_pictures(demo):
    path = SAMPLES / "owl.png"
    picture = Image.open(path)
    transparent = picture.convert("RGBA")
    forms = [path, str(path), path.read_bytes(), picture, transparent, np.asarray(picture)]
    captions = demo.generate(forms)
    assert {caption.text for caption in captions} == {"an owl on a purple background"}
    buffer = io.BytesIO()
    picture.convert("L").save(buffer, "PNG")
    grey = np.asarray(picture.convert("L"))
    assert demo.generate([grey])[0].text == demo.generate([buffer.getvalue()])[0].text


@pytest.mark.parametrize("kind", ["closed", "mode", "path"])
def test_what_pillow_or_the_system_can_not_take_is_named(kind, demo):
    picture: Image.Image | str = Image.new("La", (9, 9)) if kind == "mode" else "a\0.png"
    if kind == "closed":
        picture = Image.open(SAMPLES / "owl.png")
        picture.close()
    with pytest.raises(InvalidImage, match="image 1"):
        demo.request(picture)


def test_an_array_may_change_once_it_was_given(demo):
    pixels = demo.request(SAMPLES / "owl.png").pixels
    request = demo.request(pixels)
    before = pixels.copy()
    pixels[:] = 0
    assert (request.pixels == before).all()


@pytest.mark.parametrize(
    "line", [Image.new("RGB", (1, 60_000)), np.zeros((200_000, 1, 3), np.uint8)]
)
def test_a_line_of_pixels_is_not_blown_up(demo, line):
    with pytest.raises(TooManyPixels, match="far longer than wide"):
        demo.request(line)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Image.new("RGB", (0, 3)), "image 2: the image is empty"),
        (b"hello", "image 2: not an image"),
        ("no/such.png", r"image 2 \(no/such.png\)"),
        (np.zeros((4, 4, 3)), "image 2: an array of float64"),
        (np.zeros((0, 4, 3), np.uint8), "image 2: an array"),
        (7, "image 2: int is no image"),
    ],
)
def test_an_error_names_the_image(wrong, message):
    with pytest.raises(InvalidImage, match=message):
        fake_engine().generate([image(1), wrong])


@pytest.mark.parametrize("given", [
    ["no/such.png"], [Path("no/such.png")], [b"?"], [Image.new("RGB", (3, 3))],
    [[image(1)], "how many"],
])  # fmt: skip
def test_one_image_or_prompt_in_place_of_a_list_is_told(given):
    with pytest.raises(InvalidRequest, match="lists"):
        fake_engine().generate(*given)


def test_a_request_may_be_of_a_file_and_stream(demo):
    async def read():
        request = demo.request(SAMPLES / "owl.png", stream=True)
        return [output async for output in AsyncEngine(demo).generate(request)], request

    outputs, request = asyncio.run(read())
    assert len(outputs) > 3
    assert demo.caption(request, *outputs).text == "an owl on a purple background"
