"""Several images in one request: each its caption, or what is wrong with it, in their order."""

import base64
import json

import pytest

from runtime.planning.config import EngineConfig
from tests.support.fakes import allergic_engine, fake_engine, video_engine
from tests.support.live import png, serve, small_images


@pytest.fixture(scope="module")
def live():
    with serve(lambda: fake_engine(EngineConfig(slots=3)), slots=3) as live:
        yield live


@pytest.fixture
def images(tmp_path) -> list[bytes]:
    return [file.read_bytes() for file in small_images(tmp_path, 4)]


def said(images, prompts=(None,) * 9) -> list[str]:
    prompts = list(prompts)[: len(images)]
    return [caption.text for caption in fake_engine().generate(images, prompts)]


def in_base64(image: bytes) -> str:
    return base64.b64encode(image).decode()


def ask(live, **body):
    return live.caption(json.dumps(body).encode(), **{"Content-Type": "application/json"})


def post(live, *parts: tuple[str, bytes]):
    """Post a form with the given parts, whose names may repeat."""
    head = '--frontier\r\nContent-Disposition: form-data; name="{}"\r\n\r\n'
    body = b"".join(head.format(name).encode() + data + b"\r\n" for name, data in parts)
    form = "multipart/form-data; boundary=frontier"
    return live.caption(body + b"--frontier--\r\n", **{"Content-Type": form})


def test_a_list_in_json_has_an_answer_for_each(live, images):
    before = live.metric('vignette_requests_total{outcome="ok"}')
    reply = ask(
        live, images=[*map(in_base64, images[:2]), {"image": in_base64(images[2]), "prompt": "5"}]
    )
    assert reply.status == 200
    assert [each["caption"] for each in reply.json["results"]] == said(
        images[:3], (None, None, "5")
    )
    assert {each["model"] for each in reply.json["results"]} == {"fake"}
    assert live.metric('vignette_requests_total{outcome="ok"}') == before + 1


def test_a_form_has_several_parts_and_prompts_for_each(live, images):
    parts = [("image", image) for image in images[:3]]
    reply = post(live, *parts, ("prompt", b"5"), ("prompt", b"6"), ("prompt", b"7"))
    assert [e["caption"] for e in reply.json["results"]] == said(images[:3], ("5", "6", "7"))
    reply = post(live, *parts, ("prompt", b"5"), ("prompt", b"6"))
    assert (reply.status, reply.error) == (400, "invalid_request")
    assert "2 prompts and 3 images" in reply.body.decode()
    reply = post(live, *parts, ("prompt", b"5"))
    assert [e["caption"] for e in reply.json["results"]] == said(images[:3], "555")


def test_what_is_wrong_with_one_is_said_of_that_one(live, images):
    reply = ask(
        live,
        images=[
            in_base64(images[0]),
            in_base64(b"GIF"),
            "",
            {"image": in_base64(images[1]), "prompt": "1 " * 99},
        ],
    )
    first, second, third, fourth = reply.json["results"]
    assert [first["caption"]] == said(images[:1])
    assert second["error"]["code"] == "invalid_image"
    assert third["error"]["message"] == "the image is empty: send a whole file"
    assert "prompt has 99 tokens" in fourth["error"]["message"]


def test_a_failure_of_the_engine_is_logged_and_counted_though_others_have_captions(caplog):
    with serve(lambda: allergic_engine(crashes=False), slots=4) as live:
        reply = ask(live, images=[in_base64(png()), in_base64(png((7, 7, 7)))])
        assert reply.status == 200
        assert "caption" in reply.json["results"][0]
        assert reply.json["results"][1]["error"]["code"] == "engine_failed"
        reply = ask(live, images=[in_base64(b"GIF"), in_base64(png((7, 7, 7)))])
        assert [e["error"]["code"] for e in reply.json["results"]] == [
            "invalid_image", "engine_failed",
        ]  # fmt: skip
        assert live.metric('vignette_requests_total{outcome="engine_failed"}') == 2
    assert "engine_failed" in caplog.text


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"images": []}, "must be a list of base64"),
        ({"images": "x"}, "must be a list of base64"),
        ({"images": [1]}, "not a string"),
        ({"images": [{"prompt": "1"}]}, "not a string"),
        ({"images": ["AA=="], "image": "AA=="}, "stand alone"),
        ({"images": [{"image": "AA==", "prompt": 1}]}, "prompt must be a string"),
        ({"images": [{"image": "AA==", "beams": 1}]}, "unknown field 'beams'"),
        ({"images": ["AA=="], "stream": True}, "without stream"),
        ({"images": ["AA=="] * 65}, "more than 64 images"),
    ],
)  # fmt: skip
def test_what_is_no_list_of_images_is_told(live, body, complaint):
    reply = ask(live, **body)
    assert (reply.status, reply.error) == (400, "invalid_request")
    assert complaint in reply.body.decode()


def test_for_a_model_of_clips_several_images_are_its_frames(images):
    with serve(video_engine, manifest=video_engine().manifest) as live:
        reply = ask(live, images=[in_base64(images[0])] * 2)
    assert (reply.status, reply.error) == (400, "invalid_request")


def test_urls_are_a_list_too(live):
    reply = ask(live, image_url=["https://example.org/a.png", "https://example.org/b.png"])
    assert reply.status == 200
    assert ["switched off" in e["error"]["message"] for e in reply.json["results"]] == [True, True]
    for wrong in ([], [1], ["https://example.org/a.png"] * 65):
        assert ask(live, image_url=wrong).error == "invalid_request"


def test_urls_have_a_prompt_each(live):
    urls = ["https://example.org/a.png", "https://example.org/b.png"]
    reply = ask(live, image_url=urls, prompt=["5", "6"])
    assert ["switched off" in e["error"]["message"] for e in reply.json["results"]] == [True, True]
    assert "3 prompts and 2 images" in ask(live, image_url=urls, prompt=["5"] * 3).body.decode()
