"""POST /caption, read token by token; beams, scores and samples over HTTP."""

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from runtime.model.images import pixels_of
from runtime.planning.config import EngineConfig
from server.http.answers import CaptionAnswer
from tests.support.fakes import MANIFEST, FakeRunner, Gate, fake_engine, gated
from tests.support.live import JSON, abort, as_json, b64, multipart, png, serve, until

EVENTS = "text/event-stream"


def events(body: bytes) -> list[tuple[str, dict]]:
    """Kind and content of each server-sent event."""
    found = []
    for block in body.decode().split("\n\n")[:-1]:
        kind, data = block.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.fixture(scope="module")
def live():
    with serve(lambda: fake_engine(EngineConfig(slots=8, patience=0)), slots=8) as server:
        yield server


def test_each_token_is_an_event_and_the_last_one_holds_the_answer(live):
    whole = live.caption(png(), "?max_new_tokens=6").json
    form, kind = multipart(image=png(), stream="true", max_new_tokens="6")
    body = as_json(image=b64(png()), stream=True, max_new_tokens=6)
    for reply in (
        live.caption(png(), "?stream=true&max_new_tokens=6"),
        live.caption(png(), "?max_new_tokens=6", Accept=EVENTS),
        live.caption(form, Content_Type=kind),
        live.caption(body, **JSON),
    ):
        assert reply.status == 200
        assert reply.headers["Content-Type"] == EVENTS
        *tokens, (kind_of_last, answer) = events(reply.body)
        assert [kind for kind, _ in tokens] == ["token"] * len(tokens)
        assert [content["tokens"] for _, content in tokens] == list(range(1, len(tokens) + 1))
        assert (kind_of_last, answer["caption"]) == ("caption", whole["caption"])
        assert tokens[-1][1]["text"] == whole["caption"]
        assert set(answer) == set(whole)


def test_a_token_is_told_as_soon_as_it_is_there():
    class Stepwise(FakeRunner):
        steps_allowed = threading.Semaphore(0)

        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            assert self.steps_allowed.acquire(timeout=30)
            return super().decode(tokens, fed, forced, candidates)

    engine = fake_engine()
    engine.runner = runner = Stepwise()
    whole = fake_engine().generate([pixels_of(png(), MANIFEST, 1)], max_new_tokens=3)[0].text
    with serve(lambda: engine) as live:
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
        connection.request("POST", "/caption?stream=true&max_new_tokens=3", png())
        for words in range(1, 4):
            runner.steps_allowed.release()  # the next step runs only after this event is read
            if words == 1:
                response = connection.getresponse()
            event = b"".join(response.readline() for _ in range(3))
            [(kind, content)] = events(event)
            assert (kind, content["text"]) == ("token", " ".join(whole.split()[:words]))
        assert events(response.read())[0][0] == "caption"
        connection.close()


def test_a_reader_who_leaves_frees_the_slot():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live, ThreadPoolExecutor() as pool:
        connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=30)
        engine.runner.open.clear()
        connection.request("POST", "/caption?stream=true&max_new_tokens=30", png())
        until(lambda: engine.scheduler.running)
        connection.close()
        until(lambda: live.model.admission.inside == 0)
        until(lambda: engine.stepper._commands)
        next_one = pool.submit(live.caption, png((9, 9, 9)))
        engine.runner.open.set()
        assert next_one.result().status == 200
        assert live.metric('vignette_requests_total{outcome="cancelled"}') == 1


def test_a_stream_that_is_read_to_its_end_was_not_taken_back():
    with serve(fake_engine) as live:
        assert live.caption(png(), "?stream=true&max_new_tokens=6").status == 200
        until(lambda: live.model.shares._usual > 0)  # learnt only from requests that are served


def test_a_reader_who_takes_nothing_holds_no_place(live):
    before = live.metric('vignette_requests_total{outcome="ok"}')
    image = png()
    head = f"?stream=true&logprobs=20 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}"
    client = abort(live.port, head, image)  # sends the request, and reads nothing
    until(lambda: live.metric('vignette_requests_total{outcome="ok"}') == before + 1)
    assert live.model.admission.inside == 0
    client.close()
    until(lambda: live.service.budget.held == 0)


def test_an_error_before_the_first_event_is_an_answer_and_later_an_event():
    class Breaking(Gate):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            found = super().decode(tokens, fed, forced, candidates)
            found.logprobs[:, [n >= 2 for n in fed]] = np.nan
            return found

    engine = fake_engine()
    engine.runner = Breaking()
    with serve(lambda: engine) as live:
        early = live.caption(b"no image", "?stream=true")
        assert (early.status, early.error) == (400, "invalid_image")
        reply = live.caption(png((3, 3, 3)), "?stream=true&max_new_tokens=30")
        kinds = [kind for kind, _ in events(reply.body)]
        assert kinds == ["token", "token", "error"]
        assert events(reply.body)[-1][1]["error"]["code"] == "engine_failed"
        assert live.metric('vignette_requests_total{outcome="engine_failed"}') == 1
        assert live.metric('vignette_requests_total{outcome="ok"}') == 0


def test_beams_and_samples_and_scores_are_answered(live):
    reply = live.caption(png(), "?num_beams=3&num_return_sequences=2&logprobs=2&max_new_tokens=5")
    answer = msgspec.convert(reply.json, CaptionAnswer)
    assert len(answer.captions) == 2
    assert answer.captions[0].caption == answer.caption
    assert answer.score == pytest.approx(answer.score_sum / len(answer.logprobs))
    assert all(len(chosen.top) == 2 for chosen in answer.logprobs)
    drawn = [live.caption(png(), "?temperature=2&seed=7&n=3").json["captions"] for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3
    assert "captions" not in live.caption(png()).json
    form, kind = multipart(image=png(), num_beams="2", early_stopping="never", length_penalty="0.5")
    assert live.caption(form, Content_Type=kind).status == 200


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("num_beams=3&stream=true", "stream goes with num_beams and n of 1"),
        ("num_beams=0", "num_beams"),
        ("num_beams=2.5", "num_beams"),
        ("temperature=nan", "temperature"),
        ("temperature=warm", "temperature"),
        ("top_p=0.5", "top_p has no effect without a temperature"),
        ("early_stopping=perhaps&num_beams=2", "early_stopping"),
        ("stream=perhaps", "stream"),
        ("n=2", "n is 2"),
        ("n=2&num_return_sequences=2&num_beams=2", "num_return_sequences"),
    ],
)
def test_what_can_not_be_is_named(live, query, message):
    reply = live.caption(png(), f"?{query}")
    assert (reply.status, reply.error) == (400, "invalid_request")
    assert message in reply.json["error"]["message"]


def test_a_request_for_more_rows_waits_for_them_and_the_others_go_on():
    class Counting(FakeRunner):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            assert len(tokens) <= 4
            return super().decode(tokens, fed, forced, candidates)

    engine = fake_engine(EngineConfig(slots=4, patience=0))
    engine.runner = Counting()
    with serve(lambda: engine, slots=4) as live, ThreadPoolExecutor(12) as pool:
        queries = ["?num_beams=4", "", "?num_beams=3", "?temperature=1&n=4"] * 6
        replies = list(pool.map(lambda query: live.caption(png(), query), queries))
        assert {reply.status for reply in replies} == {200}
