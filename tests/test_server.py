"""The HTTP layer over a runner without graphs: forms, errors, queue, draining, metrics."""

import asyncio
import base64
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from runtime.config import EngineConfig
from server.admission import State
from tests.fakes import MANIFEST, FakeRunner, fake_engine, image
from tests.live import fetch, multipart, png, serve

JSON = {"Content_Type": "application/json"}


class Gate(FakeRunner):
    """Decodes only while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()

    def decode(self, tokens, fed, steps=1):
        assert self.open.wait(30)
        return super().decode(tokens, fed, steps)


def gated(slots: int = 2):
    engine = fake_engine(EngineConfig(slots=slots))
    engine.runner = Gate()
    return engine


@pytest.fixture(scope="module")
def live():
    with serve(fake_engine, slots=3) as server:
        yield server


def as_json(**fields) -> bytes:
    return json.dumps(fields).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


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
    def video():
        engine = fake_engine()
        engine.manifest = manifest
        engine.runner.pixels_shape = (3, 3, 4, 4)
        return engine

    manifest = replace(MANIFEST, sizes=replace(MANIFEST.sizes, frames=3))
    with serve(video, manifest=manifest) as live:
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
        (as_json(image=b64(png()), max_new_tokens="x"), "", JSON, 400, "invalid_request", "whole"),
        (as_json(image=b64(png()), max_new_tokens=True), "", JSON, 400, "invalid_request", "whole"),
        (as_json(image=b64(png()), max_new_tokens=1.5), "", JSON, 400, "invalid_request", "whole"),
        (as_json(image=b64(png()), max_new_tokens=0), "", JSON, 400, "invalid_request", "1 to 32"),
        (b"[" * 100_000, "", JSON, 400, "invalid_request", "not JSON"),
        (as_json(image=b64(png()), nope=1), "", JSON, 400, "invalid_request", "'nope'"),
        (as_json(image=[b64(png())] * 2), "", JSON, 400, "invalid_request", "2 images"),
        (as_json(image=b64(png()), timeout_ms=10**400), "", JSON, 400, "invalid_request",
         "between"),
        (png(), "?timeout_ms=5", {}, 400, "invalid_request", "between 100 and"),
        (b"x", "", {"Content_Type": "multipart/form-data; boundary*=idna''%80"}, 400,
         "invalid_request", "multipart"),
        (png(), f"?max_new_tokens={'9' * 5000}", {}, 400, "invalid_request", "whole number"),
        (as_json(image=b64(png()), prompt="3 " * 99), "", JSON, 400, "invalid_request", "prompt"),
        (png(), "?max_new_tokens=-3", {}, 400, "invalid_request", "whole number"),
        (png(), "?max_new_tokens=999", {}, 400, "invalid_request", "use 1 to 32"),
        (png(), "?colour=red", {}, 400, "invalid_request", "'colour'"),
        (png(), "?prompt=%ff", {}, 400, "invalid_request", "UTF-8"),
        (png(), "", {"Content_Type": "text/html"}, 415, "unsupported_media_type", "text/html"),
        (b"x", "", {"Content_Type": "multipart/form-data"}, 400, "invalid_request", "multipart"),
        (png(size=(900, 900)), "", {}, 422, "too_many_pixels", "0.5 million"),
    ],
)  # fmt: skip
def test_bad_input_is_named(body, query, headers, status, code, message):
    with serve(fake_engine, max_pixels=500_000) as live:
        reply = live.caption(body, query, **headers)
        assert (reply.status, reply.error) == (status, code)
        assert message in reply.json["error"]["message"]
        assert live.metric(f'vignette_requests_total{{outcome="{code}"}}') == 1
        assert live.caption(png()).status == 200


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


def test_the_page_says_how_to_call(live):
    page = live.request("GET", "/")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    assert b"/caption" in page.body
    assert b"http://" not in page.body and b"https://" not in page.body  # nothing from elsewhere


def test_ready_only_once_warm():
    go = threading.Event()

    def slow():
        assert go.wait(30)
        return fake_engine()

    with serve(slow, wait=False) as live:
        assert live.request("GET", "/health/live").status == 200
        starting = live.request("GET", "/health/ready")
        assert (starting.status, starting.json["status"]) == (503, "starting")
        assert live.caption(png()).error == "not_serving"
        go.set()
        deadline = time.monotonic() + 30
        while live.request("GET", "/health/ready").status != 200 and time.monotonic() < deadline:
            time.sleep(0.01)
        ready = live.request("GET", "/health/ready").json
        assert ready["model"] == "fake"
        assert ready["workers"][0]["state"] == "ready"
        assert live.caption(png()).status == 200


def test_draining_refuses_new_requests_and_finishes_old_ones():
    engine = gated()
    with serve(lambda: engine) as live, ThreadPoolExecutor() as pool:
        engine.runner.open.clear()
        accepted = pool.submit(live.caption, png())
        while live.service.admission.inside == 0:
            time.sleep(0.01)
        live.service.admission.state = State.DRAINING
        assert live.request("GET", "/health/ready").json["status"] == "draining"
        refused = live.caption(png())
        assert (refused.status, refused.error) == (503, "not_serving")
        engine.runner.open.set()
        assert accepted.result().status == 200


def test_a_full_queue_answers_429_at_once_and_counts_it():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1, max_queue=2) as live, ThreadPoolExecutor() as pool:
        engine.runner.open.clear()
        accepted = [pool.submit(live.caption, png()) for _ in range(3)]
        while live.service.admission.inside < 3:
            time.sleep(0.01)
        refused = [live.caption(png()) for _ in range(2)]
        assert [(r.status, r.error) for r in refused] == [(429, "queue_full")] * 2
        assert all(int(r.headers["Retry-After"]) >= 1 for r in refused)
        engine.runner.open.set()
        assert [a.result().status for a in accepted] == [200] * 3
        assert live.metric('vignette_requests_total{outcome="queue_full"}') == 2
        assert live.metric('vignette_requests_total{outcome="ok"}') == 3


def test_requests_that_arrive_together_are_decoded_together():
    engine = gated(slots=8)
    with serve(lambda: engine, slots=8) as live, ThreadPoolExecutor(9) as pool:
        engine.runner.open.clear()
        first = pool.submit(live.caption, png())
        while live.service.admission.inside == 0:
            time.sleep(0.01)
        rest = [pool.submit(live.caption, png((i, i, i)), "?max_new_tokens=9") for i in range(8)]
        until(lambda: live.service.links.dispatcher.inside == 9)
        engine.runner.open.set()
        assert {f.result().status for f in (first, *rest)} == {200}
        assert max(engine.runner.steps) == 8


def abort(port: int, head: str, body: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"POST /caption{head}\r\n\r\n".encode() + body)
    return client


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_client_that_leaves_is_dropped_from_the_batch_at_once():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live:
        engine.runner.open.clear()
        image = png()
        head = f"?max_new_tokens=30 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}"
        client = abort(live.port, head, image)
        until(lambda: engine.scheduler.running)
        client.close()
        until(lambda: live.service.admission.inside == 0)
        engine.runner.open.set()
        until(lambda: engine.scheduler.idle)
        assert len(engine.runner.steps) <= 2  # of the 30 that it had asked for
        assert live.metric('vignette_requests_total{outcome="cancelled"}') == 1
        assert live.metric('vignette_requests_total{outcome="internal"}') == 0


def test_uploads_that_are_broken_off_leave_nothing_behind():
    with serve(fake_engine) as live:
        tasks = lambda: len(asyncio.all_tasks(live.loop))  # noqa: E731
        live.caption(png())
        before = tasks()
        for _ in range(20):
            abort(live.port, " HTTP/1.1\r\nHost: x\r\nContent-Length: 90000", b"x" * 9000).close()
        until(lambda: tasks() <= before)
        assert live.caption(png()).status == 200


def test_a_chunked_body_without_end_is_cut_off():
    with serve(fake_engine, max_body_bytes=10_000) as live:
        client = abort(live.port, " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked", b"")
        chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
        with pytest.raises(OSError):
            for _ in range(10_000):
                client.sendall(chunk)
        client.close()
        assert live.metric('vignette_requests_total{outcome="body_too_large"}') == 1
        assert live.caption(png()).status == 200


def test_a_step_that_fails_once_is_not_noticed():
    engine = fake_engine()
    with serve(lambda: engine) as live:
        expected = live.caption(png()).json["caption"]
        engine.runner.fail_next = RuntimeError("out of memory, say")
        assert live.caption(png()).json["caption"] == expected


def test_an_image_that_breaks_the_engine_harms_itself_alone():
    """It is tried again alone, answered, and refused from then on; its batch gets captions."""

    class Allergic(Gate):
        def decode(self, tokens, fed, steps=1):
            assert self.open.wait(30)
            if any(self.cache[row][0] == 3 * 16 * 66 for row in range(len(tokens))):
                raise RuntimeError("secret detail")
            return FakeRunner.decode(self, tokens, fed, steps)

    engine = fake_engine(EngineConfig(slots=8, patience=0))
    engine.runner = Allergic()
    with serve(lambda: engine, slots=8) as live, ThreadPoolExecutor(8) as pool:
        expected = [live.caption(png((i, i, i))).json["caption"] for i in range(6)]
        engine.runner.open.clear()
        good = [pool.submit(live.caption, png((i, i, i))) for i in range(6)]
        bad = pool.submit(live.caption, png((66, 66, 66)))
        until(lambda: live.service.admission.inside == 7)
        engine.runner.open.set()
        reply = bad.result()
        assert (reply.status, reply.error) == (500, "engine_failed")
        assert b"secret" not in reply.body
        assert [f.result().json["caption"] for f in good] == expected
        again = live.caption(png((66, 66, 66)))
        assert (again.status, again.error) == (500, "engine_failed")
        assert "not tried again" in again.json["error"]["message"]


def test_a_process_that_keeps_failing_is_left():
    """After three failed steps it is the process that is suspected, not the images."""
    from server.metrics import WorkerMetrics
    from server.worker import Worker

    class Socket:
        def __init__(self, jobs):
            self.jobs, self.sent = jobs, []

        def poll(self, timeout=None):
            return bool(self.jobs)

        def recv_multipart(self):
            return self.jobs.pop(0)

        def send_multipart(self, parts):
            self.sent.append(json.loads(parts[1]))

    class Broken(FakeRunner):
        def decode(self, tokens, fed, steps=1):
            raise RuntimeError("illegal memory access")

    engine = fake_engine()
    engine.runner = Broken()
    asked = {"op": "caption", "slot": 0, "prompt": None, "max_new_tokens": 3, "queued_at": 0.0,
             "urgent": True, "deadline": None}  # fmt: skip
    socket = Socket([])
    worker = Worker(engine, socket, WorkerMetrics())
    worker._stores[b"front"] = [image(1)]
    for number in range(3):
        assert not worker.broken
        socket.jobs.append([b"front", json.dumps({**asked, "id": number}).encode()])
        worker._take_in()
        worker._step()
    assert worker.broken and worker.stopping
    assert [m["op"] for m in socket.sent] == ["started", "failed", "started", "failed", "started"]


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
    assert live.metric("vignette_running_rows") == 0
    assert fetch(live.port, "GET", "/metrics").headers["Content-Type"].startswith("text/plain")
