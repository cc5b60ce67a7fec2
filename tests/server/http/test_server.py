"""A service from start to end over a runner without graphs: readiness, queue, clients, failures."""

import asyncio
import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from msgspec.structs import replace

from runtime.planning.config import EngineConfig
from server.ipc.messages import Serving
from server.processes.frontend import update
from server.service.admission import State
from server.service.client_rates import ClientRates
from tests.support.fakes import FakeRunner, Gate, fake_engine, gated
from tests.support.live import abort, png, requests_in, serve, until


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
        until(lambda: live.request("GET", "/health/ready").status == 200)
        ready = live.request("GET", "/health/ready").json
        assert ready["models"] == {"fake": "ready"}
        [worker] = ready["workers"]
        assert (worker["state"], worker["precision"], worker["slots"]) == ("ready", "fake", 3)
        assert live.caption(png()).status == 200


def test_a_model_whose_engine_does_not_start_again_refuses_at_once():
    with serve(fake_engine) as live:
        [worker] = live.service.workers
        serving = Serving((replace(worker, state="failing"),), {}, 0)
        live.loop.call_soon_threadsafe(update, live.service, serving)
        until(lambda: live.request("GET", "/health/ready").json["models"] == {"fake": "failing"})
        assert live.caption(png()).error == "not_serving"


def test_draining_refuses_new_requests_and_finishes_old_ones():
    engine = gated()
    with serve(lambda: engine) as live, ThreadPoolExecutor() as pool:
        engine.runner.open.clear()
        accepted = pool.submit(live.caption, png())
        until(lambda: live.model.admission.inside)
        live.model.admission.state = State.DRAINING
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
        until(lambda: live.model.admission.inside == 3)
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
        until(lambda: live.model.admission.inside)
        rest = [pool.submit(live.caption, png((i, i, i)), "?max_new_tokens=9") for i in range(8)]
        until(lambda: requests_in(live.model.links.dispatcher) == 9)
        engine.runner.open.set()
        assert {f.result().status for f in (first, *rest)} == {200}
        assert max(engine.runner.steps) == 8


def test_who_leaves_several_images_is_charged_for_each(monkeypatch):
    left = []
    monkeypatch.setattr(ClientRates, "was_abandoned", lambda _, client, images: left.append(images))
    engine = gated(slots=8)
    body = json.dumps({"images": [base64.b64encode(png()).decode()] * 5}).encode()
    head = f" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with serve(lambda: engine, slots=8) as live:
        engine.runner.open.clear()
        client = abort(live.port, head, body)
        until(lambda: live.model.admission.inside == 5)
        client.close()
        until(lambda: left)
        engine.runner.open.set()
    assert left == [5]


def test_a_client_that_leaves_is_dropped_from_the_batch_at_once():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live:
        engine.runner.open.clear()
        image = png()
        head = f"?max_new_tokens=30 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}"
        client = abort(live.port, head, image)
        until(lambda: engine.scheduler.running)
        client.close()
        until(lambda: live.model.admission.inside == 0)
        until(lambda: engine.stepper._commands)  # the cancellation arrives while the step runs
        engine.runner.open.set()
        until(lambda: engine.scheduler.idle)
        assert len(engine.runner.steps) <= 2  # of the 30 requested
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


def beside_a_bad_one(live, engine, pool, count):
    """The answer to an image that the runner can't bear, whose batch gets captions as alone."""
    expected = [live.caption(png((i, i, i))).json["caption"] for i in range(count)]
    engine.runner.open.clear()
    good = [pool.submit(live.caption, png((i, i, i))) for i in range(count)]
    bad = pool.submit(live.caption, png((66, 66, 66)))
    until(lambda: live.model.admission.inside == count + 1)
    engine.runner.open.set()
    assert [f.result().json["caption"] for f in good] == expected
    return bad.result()


def test_an_image_whose_numbers_break_down_fails_alone():
    class Overflowing(Gate):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            found = super().decode(tokens, fed, forced, candidates)
            broken = [self.cache[row][0] == 3 * 16 * 66 for row in range(len(tokens))]
            found.logprobs[:, broken] = np.nan
            return found

    engine = fake_engine(EngineConfig(slots=4, patience=0))
    engine.runner = Overflowing()
    with serve(lambda: engine, slots=4) as live, ThreadPoolExecutor(4) as pool:
        bad = beside_a_bad_one(live, engine, pool, 3)
        assert (bad.status, bad.error) == (500, "engine_failed")


def test_an_image_that_breaks_the_engine_harms_itself_alone():
    """It is tried again alone, answered, and refused from then on; its batch gets captions."""

    class Allergic(Gate):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            assert self.open.wait(30)
            if any(self.cache[row][0] == 3 * 16 * 66 for row in range(len(tokens))):
                raise RuntimeError("secret detail")
            return FakeRunner.decode(self, tokens, fed, forced, candidates)

    engine = fake_engine(EngineConfig(slots=8, patience=0))
    engine.runner = Allergic()
    with serve(lambda: engine, slots=8) as live, ThreadPoolExecutor(8) as pool:
        reply = beside_a_bad_one(live, engine, pool, 6)
        assert (reply.status, reply.error) == (500, "engine_failed")
        assert b"secret" not in reply.body
        again = live.caption(png((66, 66, 66)))
        assert (again.status, again.error) == (500, "engine_failed")
        assert "not tried again" in again.json["error"]["message"]
