"""Who comes in: keys, classes, bytes, deadlines, and the cache in front of it all."""

import asyncio
import hashlib
import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

import server.keys
from runtime.config import EngineConfig
from runtime.request import Caption, FinishReason, Request, Terms
from runtime.scheduler import Scheduler
from server.admission import Admission, QueueFull, State
from server.cache import CaptionCache
from server.keys import InvalidKeys, Keys, TooFast, Unauthorised, read
from tests.conftest import ROOT
from tests.fakes import fake_engine, gated
from tests.live import as_json, b64, png, serve, until

JSON = {"Content_Type": "application/json"}


def waiting(scheduler: Scheduler, name: str, **terms):
    return scheduler.add(Request(name, (0,), 4, terms=Terms(**terms)))


def test_urgent_requests_are_admitted_first():
    scheduler = Scheduler(slots=3, encode_batch=3)
    for name, urgent in (("a", False), ("b", True), ("c", False), ("d", True)):
        waiting(scheduler, name, urgent=urgent)
    assert [s.request.pixels for s in scheduler.admit()] == ["b", "d", "a"]


def test_what_expires_is_never_admitted():
    scheduler = Scheduler(slots=3, encode_batch=3)
    late, _ = waiting(scheduler, "a", deadline=5.0), waiting(scheduler, "b", deadline=15.0)
    assert scheduler.expire(10.0) == [late]
    assert late.expired
    assert [s.request.pixels for s in scheduler.admit()] == ["b"]
    assert scheduler.expire(20.0) == [], "what runs is finished"


def test_a_deadline_in_the_queue_is_answered_504_and_never_executed():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live, ThreadPoolExecutor() as pool:
        engine.runner.open.clear()
        first = pool.submit(live.caption, png())
        until(lambda: engine.scheduler.running)
        late = live.caption(png(), "?timeout_ms=150")
        also = live.caption(png(), X_Timeout_Ms="150")
        assert [(r.status, r.error) for r in (late, also)] == [(504, "deadline_exceeded")] * 2
        engine.runner.open.set()
        assert first.result().status == 200
        until(lambda: engine.scheduler.idle)
        assert sum(engine.runner.encoded) == 1
        assert live.metric('vignette_requests_total{outcome="deadline_exceeded"}') == 2


def test_the_batch_class_waits_for_the_interactive_one():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live, ThreadPoolExecutor(8) as pool:
        engine.runner.open.clear()
        first = pool.submit(live.caption, png())
        until(lambda: engine.scheduler.running)
        patient, urgent = png((1, 1, 1)), png((2, 2, 2))
        batch = [pool.submit(live.caption, patient, "?priority=batch") for _ in range(2)]
        until(lambda: live.service.links.dispatcher.inside == 3)
        interactive = [pool.submit(live.caption, urgent) for _ in range(2)]
        until(lambda: live.service.links.dispatcher.inside == 5)
        engine.runner.open.set()
        assert {f.result().status for f in (first, *batch, *interactive)} == {200}
        assert [total // 48 for total in engine.runner.seen[1:]] == [2, 2, 1, 1]
        bad = live.caption(png(), "?priority=high")
        assert "interactive, batch" in bad.json["error"]["message"]


def test_bodies_are_bounded_together():
    engine = gated(slots=1)
    image = png(size=(90, 90)) + b" " * 5000
    with serve(lambda: engine, slots=1, max_queue_bytes=2 * len(image) + 2000) as live:
        slow = socket.create_connection(("127.0.0.1", live.port))
        head = f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n"
        slow.sendall(head.encode() + image[:-1])
        until(lambda: live.service.admission.held_bytes)
        reply = live.caption(image)
        assert (reply.status, reply.error) == (429, "queue_full")
        assert int(reply.headers["Retry-After"]) >= 1
        slow.close()
        until(lambda: live.service.admission.held_bytes == 0)
        assert live.caption(image).status == 200
        until(lambda: live.service.admission.held_bytes == 0)


def keys_file(tmp_path, *lines: str):
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return path


def line(name: str, key: str, rate: str = "0", at_once: str = "0") -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate} {at_once}"


def test_only_those_with_a_key_come_in(tmp_path, caplog):
    path = keys_file(tmp_path, "# ours", line("web", "secret-key"), line("app", "other"))
    with serve(fake_engine, api_keys=path) as live:
        for headers in ({}, {"Authorization": "Bearer nope"}, {"X_API_Key": "nope"}):
            reply = live.caption(png(), **headers)
            assert (reply.status, reply.error) == (401, "unauthorised")
            assert reply.headers["Www-Authenticate"] == "Bearer"
        assert live.caption(png(), Authorization="Bearer secret-key").status == 200
        assert live.caption(png(), X_API_Key="other").status == 200
        assert live.request("GET", "/health/live").status == 200
    assert "secret-key" not in caplog.text


def test_a_key_has_a_rate_and_a_number_at_once(tmp_path):
    path = keys_file(tmp_path, line("slow", "a", "1"), line("narrow", "b", "0", "1"))
    keys = Keys.open(path, tmp_path)
    for _ in range(2):  # two seconds' worth at once
        with keys.enter("a"):
            pass
    with pytest.raises(TooFast, match="1 requests a second") as said, keys.enter("a"):
        pass
    assert said.value.retry_after == 1
    with keys.enter("b") as name:
        assert name == "narrow"
        with pytest.raises(TooFast, match="1 requests at once"), keys.enter("b"):
            pass
    with keys.enter("b"), pytest.raises(Unauthorised), keys.enter("c"):
        pass


def test_front_ends_count_together(tmp_path):
    path = keys_file(tmp_path, line("slow", "a", "0.5"), line("narrow", "b", "0", "1"))
    first, second = (Keys.open(path, tmp_path, 2, index) for index in range(2))
    with (
        first.enter("a"),
        pytest.raises(TooFast, match=r"0\.5 requests a second"),
        second.enter("a"),
    ):
        pass
    with second.enter("b"), pytest.raises(TooFast, match="1 requests at once"), first.enter("b"):
        pass
    with first.enter("b"):
        pass
    died = first.enter("b")
    died.__enter__()
    with pytest.raises(TooFast), second.enter("b"):
        pass
    restarted = Keys.open(path, tmp_path, 2, 0)
    with restarted.enter("b"):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [("web abc 0 0", "line 1"), ("web", "line 1"), ("", "has no keys"),
     ("a " + "00" * 8 + " 0 0", "sha256"), ("a " + "00" * 32 + " nan 0", "line 1"),
     ("a " + "00" * 32 + " 0 -1", "line 1")],
)  # fmt: skip
def test_a_key_file_that_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(InvalidKeys, match=message):
        read(keys_file(tmp_path, text))
    with pytest.raises(InvalidKeys, match="can't be read"):
        read(tmp_path / "none")


def test_keys_are_made_with_a_command(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "server.keys", "web", "5"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = made.stderr.rpartition(": ")[2].strip()
    with Keys.open(keys_file(tmp_path, made.stdout), tmp_path).enter(key) as name:
        assert name == "web"


@pytest.mark.parametrize("words", [["bob smith"], ["bob", "often"], ["bob", "1", "2.5"]])
def test_a_key_that_the_server_would_refuse_is_not_made(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keys", *words])
    assert server.keys.main() == 2
    said = capsys.readouterr()
    assert "NAME is one word" in said.err
    assert not said.out


def caption(text: str) -> Caption:
    return Caption(text, (3, 1), FinishReason.STOP, 0, 1, 0.0, 0.0, 0.0)


def test_one_flight_serves_all_who_ask_meanwhile():
    async def run():
        cache, flights = CaptionCache(10_000), []

        async def make():
            flights.append(1)
            await asyncio.sleep(0.01)
            return caption("a"), 0.1

        found = await asyncio.gather(*(cache.get(("x", None, None), make) for _ in range(5)))
        assert {c.text for c, _ in found} == {"a"}
        assert len(flights) == 1

    asyncio.run(run())


def test_a_flight_that_fails_is_nobody_elses():
    async def run():
        cache, tries = CaptionCache(10_000), []

        async def make():
            tries.append(1)
            await asyncio.sleep(0.01)
            if len(tries) == 1:
                raise TimeoutError
            return caption("b"), 0.1

        asked = [asyncio.create_task(cache.get(("x", None, None), make)) for _ in range(3)]
        done = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(done[0], TimeoutError)
        assert [c.text for c, _ in done[1:]] == ["b", "b"]
        assert len(tries) == 2

    asyncio.run(run())


def test_the_cache_is_bounded_and_forgets_what_was_not_asked_for():
    async def run():
        cache = CaptionCache(5_000)
        for n in range(100):
            await cache.get((f"{n:064}", None, None), lambda n=n: made(n))
            await cache.get((f"{0:064}", None, None), lambda: made(0))
            assert cache.size <= 5_000
        before = len(flown)
        await cache.get((f"{0:064}", None, None), lambda: made(0))
        assert len(flown) == before, "what is asked for stays"
        await cache.get((f"{1:064}", None, None), lambda: made(1))
        assert len(flown) == before + 1

    flown = []

    async def made(n: int):
        flown.append(n)
        return caption(f"caption {n}"), 0.0

    asyncio.run(run())


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def saturated(admission: Admission, clock: Clock, requests: int, each: float) -> None:
    """So many requests, one after another, while others wait."""
    with ExitStack() as others:
        for _ in range(admission.slots):
            others.enter_context(admission.enter())
        for _ in range(requests):
            with admission.enter():
                clock.now += each


def admitting(queue: int = 100, deadline: float = 30.0) -> tuple[Admission, Clock]:
    clock = Clock()
    admission = Admission(queue, 1000, deadline, clock)
    admission.state, admission.slots = State.READY, 2
    return admission, clock


def refused_after(admission: Admission) -> tuple[int, int]:
    """How many are let in, and what the next is told."""
    with ExitStack() as inside:
        for count in range(1000):
            try:
                inside.enter_context(admission.enter())
            except QueueFull as full:
                return count, full.retry_after
    raise AssertionError("all were let in")


def test_a_client_is_told_how_long_the_queue_will_take_whatever_was_before():
    admission, clock = admitting(queue=8)
    assert refused_after(admission) == (10, 1)  # nothing is known yet
    saturated(admission, clock, 64, each=2.0)
    clock.now += 100_000  # a night without requests
    for _ in range(20):  # and a few, far apart, for which nobody had to wait
        clock.now += 50
        with admission.enter():
            clock.now += 1
    assert refused_after(admission) == (10, 20)
    saturated(admission, clock, 64, each=9.0)
    assert refused_after(admission)[1] <= 60


def test_no_more_are_let_in_than_can_be_captioned_in_time():
    admission, clock = admitting(queue=100, deadline=30.0)
    saturated(admission, clock, 64, each=1.0)
    assert refused_after(admission) == (27, 27)
    saturated(admission, clock, 64, each=0.1)
    assert refused_after(admission)[0] == 102
    saturated(admission, clock, 64, each=1000.0)
    assert refused_after(admission)[0] == 4, "so many may always come in, and then"
    saturated(admission, clock, 64, each=0.1)
    assert refused_after(admission)[0] == 102, "it is seen that all is well again"


def test_identical_images_are_captioned_once_if_that_is_wished():
    engine = fake_engine()
    with serve(lambda: engine, cache_mb=1) as live:
        first = live.caption(png())
        again = live.caption(png())
        prompted = live.caption(png(), "?prompt=3")
        assert first.json["caption"] == again.json["caption"]
        assert sum(engine.runner.encoded) == 2
        assert prompted.json["usage"]["prompt_tokens"] == 1
        assert live.metric("vignette_cache_hits_total") == 1
        gone_through = {k for k, v in again.json["timing_ms"].items() if v}
        assert gone_through <= {"total"}, "no time was spent on what was known"
        assert live.metric('vignette_stage_seconds_count{stage="encode"}') == 2
        assert live.metric('vignette_stage_seconds_count{stage="total"}') == 3


def test_every_answer_carries_a_request_id():
    with serve(fake_engine) as live:
        assert live.caption(png(), X_Request_Id="mine-1").headers["X-Request-Id"] == "mine-1"
        made = [live.caption(b"x", X_Request_Id="no\tgood").headers["X-Request-Id"]
                for _ in range(2)]  # fmt: skip
        assert len(set(made)) == 2
        assert all(len(name) == 32 for name in made)


def test_image_url_is_off_unless_domains_are_allowed():
    with serve(fake_engine) as live:
        reply = live.caption(as_json(image_url="https://example.org/x.png"), **JSON)
        assert "switched off" in reply.json["error"]["message"]
        both = live.caption(as_json(image_url="https://x", image=b64(png())), **JSON)
        assert "either image or image_url" in both.json["error"]["message"]


def test_health_and_metrics_can_have_a_port_of_their_own():
    with serve(fake_engine, ops_port=0) as live:
        assert live.caption(png()).status == 200
        for path in ("/metrics", "/health/ready", "/health/live"):
            assert live.request("GET", path).status == 404


def test_the_log_can_be_one_json_object_a_line(capfd):
    import logging

    from server.logs import configure, flush, request_id
    from server.settings import Settings

    before = logging.getLogger().handlers[:]
    try:
        configure(Settings(_env_file=None, log_format="json"))
        token = request_id.set("abc")
        logging.getLogger("server.x").warning("a %s", "word")
        request_id.reset(token)
        flush()
        said = json.loads(capfd.readouterr().err)
    finally:
        logging.basicConfig(handlers=before, force=True)
    assert said["message"] == "a word"
    assert (said["level"], said["request_id"]) == ("WARNING", "abc")


def test_a_line_for_each_request_if_that_is_wished(caplog):
    caplog.set_level("INFO")
    for wished in (False, True):
        with serve(fake_engine, access_log=wished) as live:
            live.caption(b"no image", "?prompt=3", X_Request_Id="find-me")
        lines = [r.getMessage() for r in caplog.records if "find-me" in r.getMessage()]
        assert len(lines) == wished
    assert lines[0].startswith("POST /caption 400 ")


def test_what_the_engine_failed_on_is_logged_with_its_request(caplog):
    engine = fake_engine()
    with serve(lambda: engine) as live:
        live.caption(png())
        engine.runner.decode = None
        assert live.caption(png(), X_Request_Id="find-me").status == 500
    assert "request find-me: engine_failed" in caplog.text


def test_a_variable_that_is_no_setting_is_told():
    from server.settings import unknown_variables

    told = unknown_variables(["HOME", "VIGNETTE_SLOT", "VIGNETTE_SLOTS", "VIGNETTE_X"])
    assert told == [
        "VIGNETTE_SLOT is no setting and has no effect: did you mean VIGNETTE_SLOTS?",
        "VIGNETTE_X is no setting and has no effect",
    ]


def test_settings_share_the_cores_among_workers_on_a_processor():
    from server.settings import Settings

    assert Settings(_env_file=None).engine_config.threads == 0
    assert Settings(_env_file=None, workers=2).engine_config.threads >= 1
    assert Settings(_env_file=None, workers=2, provider="cuda").engine_config.threads == 0
    assert EngineConfig().slots is None
