"""What a request may look like, and what is answered: forms, errors, pages, metrics."""

from dataclasses import replace
from functools import partial

import pytest

from tests.support.fakes import MANIFEST, fake_engine, video_engine
from tests.support.live import JSON, as_json, b64, fetch, multipart, png, serve


@pytest.fixture(scope="module")
def live():
    with serve(fake_engine, slots=3) as server:
        yield server


@pytest.fixture(scope="module")
def strict():
    with serve(fake_engine, max_pixels=500_000) as server:
        yield server


def test_three_forms_say_the_same(live):
    image = png()
    form, kind = multipart(image=image, prompt="3 4", max_new_tokens="5")
    replies = [
        live.caption(image, "?prompt=3%204&max_new_tokens=5", Content_Type="image/png"),
        live.caption(image, "?prompt=3+4&max_new_tokens=5"),
        live.caption(form, Content_Type=kind),
        live.caption(as_json(image=b64(image), prompt="3 4", max_new_tokens=5), **JSON),
        live.caption(
            as_json(image="data:image/png;base64," + b64(image), prompt="3 4", max_new_tokens=5),
            **JSON,
        ),
    ]
    assert [r.status for r in replies] == [200] * 5
    assert len({r.json["caption"] for r in replies}) == 1
    answer = replies[0].json
    assert answer["model"] == "fake"
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] <= 5
    assert set(answer["timing_ms"]) == {"queue", "preprocess", "encode", "decode", "total"}
    assert answer["timing_ms"]["total"] >= answer["timing_ms"]["decode"] >= 0


def test_what_curl_sends_by_default_is_taken_as_the_image(live):
    assert live.caption(png(), Content_Type="application/x-www-form-urlencoded").status == 200


@pytest.mark.parametrize(
    ("accept", "plain"),
    [
        ("text/plain", True),
        ("text/plain, */*", True),
        ("text/plain;q=0.9, application/json;q=0.5", True),
        ("application/json, text/plain, */*", False),  # what axios sends
        ("text/plain;q=0", False),
        ("text/plain;q=x", False),
        ("text/plain;q=\u00b2".encode().decode("latin-1"), False),
        ("*/*", False),
        ("", False),
    ],
)
def test_plain_text_for_those_who_prefer_it(live, accept, plain):
    reply = live.caption(png(), Accept=accept)
    assert reply.headers["Content-Type"].startswith("text/plain" if plain else "application/json")
    said = reply.body.decode().strip() if plain else reply.json["caption"]
    assert said == live.caption(png()).json["caption"]


def test_media_types_are_read_in_any_case_and_blank_fields_are_none(live):
    form, kind = multipart(image=png(), prompt="", max_new_tokens="")
    for written in (kind, kind.replace("multipart/form-data", "Multipart/Form-Data"),
                    kind.replace("boundary=frontier", 'Boundary="frontier"')):  # fmt: skip
        assert live.caption(form, Content_Type=written).status == 200


def test_a_video_request_carries_its_frames():
    with serve(partial(video_engine, 3), manifest=video_engine(3).manifest) as live:
        frames = [b64(png((i, i, i))) for i in range(3)]
        assert live.caption(as_json(image=frames), **JSON).status == 200
        reply = live.caption(png())
        assert (reply.status, reply.error) == (400, "invalid_request")
        assert "1 images were sent: this model takes 3" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "query", "headers", "status", "code", "message"),
    [
        (b"", "", {}, 400, "invalid_request", "empty"),
        (b"hello", "", {}, 400, "invalid_image", "not an image"),
        (png(size=(300, 300))[:-40], "", {}, 400, "invalid_image", "damaged"),
        (b"{", "", JSON, 400, "invalid_request", "not JSON"),
        (b"\xff\xfe\x00", "", JSON, 400, "invalid_request", "not JSON"),
        (b"[1]", "", JSON, 400, "invalid_request", "not an object"),
        (b"{}", "", JSON, 400, "invalid_request", "'image' is missing"),
        (as_json(image=5), "", JSON, 400, "invalid_request", "not a string"),
        (as_json(image="?!"), "", JSON, 400, "invalid_request", "not base64"),
        (as_json(image=""), "", JSON, 400, "invalid_request", "empty"),
        (as_json(image=b64(b"hello")), "", JSON, 400, "invalid_image", "not an image"),
        (as_json(image=b64(png()), prompt=5), "", JSON, 400, "invalid_request", "prompt"),
        (as_json(image=b64(png()), max_new_tokens="x"), "", JSON, 400, "invalid_request", "valid"),
        (as_json(image=b64(png()), max_new_tokens=True), "", JSON, 400, "invalid_request", "valid"),
        (as_json(image=b64(png()), max_new_tokens=1.5), "", JSON, 400, "invalid_request", "valid"),
        (as_json(image=b64(png()), max_new_tokens=0), "", JSON, 400, "invalid_request", "to 1"),
        (b"[" * 10_000, "", JSON, 400, "invalid_request", "not JSON"),
        (b"[" * 100_000, "", JSON, 400, "invalid_request", "too large without its image"),
        (as_json(image=b64(png()), nope=1), "", JSON, 400, "invalid_request", "'nope'"),
        (as_json(image=b64(png()), timeout_ms=10**400), "", JSON, 400, "invalid_request",
         "equal to 3600000"),
        (png(), "?timeout_ms=5", {}, 400, "invalid_request", "equal to 100"),
        (b"x", "", {"Content_Type": "multipart/form-data; boundary*=idna''%80"}, 400,
         "invalid_request", "multipart"),
        (png(), f"?max_new_tokens={'9' * 5000}", {}, 400, "invalid_request", "valid integer"),
        (as_json(image=b64(png()), prompt="3 " * 99), "", JSON, 400, "invalid_request", "prompt"),
        (png(), "?max_new_tokens=-3", {}, 400, "invalid_request", "valid integer"),
        (png(), "?max_new_tokens=999", {}, 400, "invalid_request", "use 1 to 32"),
        (png(), "?colour=red", {}, 400, "invalid_request", "'colour'"),
        (png(), "?prompt=%ff", {}, 400, "invalid_request", "UTF-8"),
        (png(), "", {"Content_Type": "text/html"}, 415, "unsupported_media_type", "text/html"),
        (b"x", "", {"Content_Type": "multipart/form-data"}, 400, "invalid_request", "multipart"),
        (png(size=(900, 900)), "", {}, 422, "too_many_pixels", "0.5 million"),
    ],
)  # fmt: skip
def test_bad_input_is_named(strict, body, query, headers, status, code, message):
    counter = f'vignette_requests_total{{outcome="{code}"}}'
    before = strict.metric(counter)
    reply = strict.caption(body, query, **headers)
    assert (reply.status, reply.error) == (status, code)
    assert message in reply.json["error"]["message"]
    assert strict.metric(counter) == before + 1
    assert strict.caption(png()).status == 200


def test_forms_that_miss_the_image(live):
    for fields in ({"prompt": "3"}, {"picture": png()}):
        form, kind = multipart(**fields)
        reply = live.caption(form, Content_Type=kind)
        assert (reply.status, reply.error) == (400, "invalid_request")
        assert "'image'" in reply.json["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit(chunked):
    with serve(fake_engine, max_body_bytes=50_000) as live:
        body = b"x" * 120_000
        reply = live.caption(iter([body[:60_000], body[60_000:]]) if chunked else body)
        assert (reply.status, reply.error) == (413, "body_too_large")
        assert live.caption(png()).status == 200
        assert live.metric('vignette_requests_total{outcome="body_too_large"}') == 1


def test_unknown_routes_and_wrong_methods(live):
    assert live.request("GET", "/nope").error == "not_found"
    assert live.request("POST", "/nope/caption", b"x").status == 404
    for method, path in (("GET", "/caption"), ("PUT", "/caption"), ("POST", "/metrics")):
        reply = live.request(method, path, b"x")
        assert (reply.status, reply.error) == (405, "method_not_allowed")
    assert live.request("GET", "/caption").headers["Allow"] == "POST"
    assert live.request("POST", "/metrics", b"x").headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/health/live", "/health/ready"])
def test_what_can_be_got_has_a_head(live, path):
    got, head = (live.request(method, path) for method in ("GET", "HEAD"))
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(got.body))
    assert live.request("HEAD", "/caption").status == 405


def test_the_page_says_how_to_call(live):
    page = live.request("GET", "/")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert b"/docs" in page.body
    assert b"/caption" in live.request("GET", "/static/page.js").body
    assert b"http://" not in page.body and b"https://" not in page.body  # nothing from elsewhere


def test_an_error_of_ours_shows_no_detail(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("secret detail")

    with serve(fake_engine) as live:
        monkeypatch.setattr(live.service.decoders, "decode", broken)
        reply = live.caption(png())
        assert (reply.status, reply.error) == (500, "internal")
        assert b"secret" not in reply.body


def test_metrics_tell_stages_and_batches(live):
    before = live.metric('vignette_stage_seconds_count{stage="encode"}')
    live.caption(png())
    assert live.metric('vignette_stage_seconds_count{stage="encode"}') == before + 1
    assert live.metric("vignette_decode_batch_rows_count") > 0
    assert live.metric("vignette_encode_batch_images_count") > 0
    assert live.metric("vignette_queue_length") == 0
    assert live.metric("vignette_running_sequences") == 0
    assert fetch(live.port, "GET", "/metrics").headers["Content-Type"].startswith("text/plain")


def test_the_page_of_the_demo_model_says_what_it_knows_and_offers_samples():
    manifest = replace(MANIFEST, model="vignette-demo", about="It knows </script> owls.")
    with serve(fake_engine, manifest=manifest) as live:
        page = live.request("GET", "/").body.decode()
        assert "It knows \\u003c/script> owls." in page and "owl.png" in page
        sample = live.request("GET", "/samples/owl.png")
        assert sample.headers["Content-Type"] == "image/png"
        assert live.caption(sample.body).status == 200
        assert live.request("GET", "/samples/none.png").status == 404


def test_another_model_has_no_samples(live):
    assert b"owl.png" not in live.request("GET", "/").body
    assert live.request("GET", "/samples/owl.png").status == 404
