"""Who comes in: keys, classes, bytes, deadlines, and the cache in front of it all."""

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from unittest.mock import Mock

import pytest

from runtime.decoding.continuation import Continuation
from runtime.request import (
    FinishReason,
    GenerationRequest,
    Priority,
    SamplingParams,
    SchedulingParams,
)
from runtime.scheduler import Scheduler
from server.refusals import QueueFull
from server.service.admission import Admission, NotServing, State
from server.service.service import Service
from tests.support.fakes import fake_engine, gated
from tests.support.live import JSON, as_json, b64, fetch, png, requests_in, serve, until


def waiting(scheduler: Scheduler, name: str, **scheduling):
    asked, when = SamplingParams(4), SchedulingParams(**scheduling)
    request = GenerationRequest(name, (0,), asked, when)
    return scheduler.add(request, Continuation((0,), request.sampling, eos=1))


def test_interactive_requests_are_admitted_first():
    scheduler = Scheduler(slots=3, encode_batch=3)
    batch, interactive = Priority.BATCH, Priority.INTERACTIVE
    for name, priority in (("a", batch), ("b", interactive), ("c", batch), ("d", interactive)):
        waiting(scheduler, name, priority=priority)
    assert [s.request.pixels for s in scheduler.admit()] == ["b", "d", "a"]


def test_what_expires_is_never_admitted():
    scheduler = Scheduler(slots=3, encode_batch=3)
    late, _ = waiting(scheduler, "a", deadline=5.0), waiting(scheduler, "b", deadline=15.0)
    assert scheduler.expire(10.0) == [late]
    assert late.finish_reason is FinishReason.EXPIRED
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
        until(lambda: requests_in(live.model.links.dispatcher) == 3)
        interactive = [pool.submit(live.caption, urgent) for _ in range(2)]
        until(lambda: len(engine.stepper._commands) == 4)  # they are at the engine
        engine.runner.open.set()
        assert {f.result().status for f in (first, *batch, *interactive)} == {200}
        assert [total // 48 for total in engine.runner.seen[1:]] == [2, 2, 1, 1]
        bad = live.caption(png(), "?priority=high")
        assert "'interactive' or 'batch'" in bad.json["error"]["message"]


def test_bodies_are_bounded_together():
    engine = gated(slots=1)
    image = png(size=(90, 90)) + b" " * 5000
    with serve(lambda: engine, slots=1, max_queue_bytes=2 * len(image) + 2000) as live:
        slow = socket.create_connection(("127.0.0.1", live.port))
        head = f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n\r\n"
        slow.sendall(head.encode() + image[:-1])
        until(lambda: live.service.budget.held)
        reply = live.caption(image)
        assert (reply.status, reply.error) == (429, "queue_full")
        assert int(reply.headers["Retry-After"]) >= 1
        slow.close()
        until(lambda: live.service.budget.held == 0)
        assert live.caption(image).status == 200
        until(lambda: live.service.budget.held == 0)


class Clock:
    """A clock that the tests advance."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def saturated(admission: Admission, clock: Clock, requests: int, each: float) -> None:
    """Let `requests` pass one after another, `each` seconds long, while others wait."""
    with ExitStack() as others:
        for _ in range(admission.slots):
            others.enter_context(admission.enter())
            others.enter_context(admission.engine())
        for _ in range(requests):
            with admission.enter(), admission.engine():
                clock.now += each


def admitting(queue: int = 100, deadline: float = 30.0) -> tuple[Admission, Clock]:
    clock = Clock()
    admission = Admission(queue, deadline, clock)
    admission.state, admission.slots = State.READY, 2
    return admission, clock


def refused_after(admission: Admission) -> tuple[int, int]:
    """How many requests are let in, and the `retry_after` of the next."""
    with ExitStack() as inside:
        for count in range(1000):
            try:
                inside.enter_context(admission.enter())
            except QueueFull as full:
                return count, full.retry_after
    raise AssertionError("all were let in")


def test_who_asks_for_one_model_takes_no_share_of_another_s_queue():
    (first, clock), (second, _) = admitting(), admitting()
    models = {"a": Mock(admission=first), "b": Mock(admission=second)}
    service = Mock(models=models)
    with first.enter("x"):
        for _ in range(3):
            Service.check_room(service, "y")
            with second.enter("y"):
                clock.now += 1
        assert first.alone("x")
        clock.now += 100
        assert first.alone("x")
    first.failing = second.failing = True
    with pytest.raises(NotServing):
        Service.check_room(service, "z")
    assert not second.alone("y"), "who finds no place anywhere is seen everywhere"


def test_a_client_is_told_how_long_the_queue_will_take_whatever_was_before():
    admission, clock = admitting(queue=8)
    assert refused_after(admission) == (10, 1)  # no service time is known yet
    saturated(admission, clock, 64, each=2.0)
    for _ in range(4):  # and a few requests, far apart, that did not have to wait
        clock.now += 10
        with admission.enter(), admission.engine():
            clock.now += 1
    assert refused_after(admission) == (10, 20)
    clock.now += 100_000  # a night without requests: what was measured before is out of date
    assert refused_after(admission) == (10, 1)
    saturated(admission, clock, 64, each=9.0)
    assert refused_after(admission)[1] <= 60


def test_no_more_are_let_in_than_can_be_captioned_in_time():
    admission, clock = admitting(queue=100, deadline=30.0)
    saturated(admission, clock, 64, each=1.0)
    assert refused_after(admission) == (27, 27)
    saturated(admission, clock, 64, each=0.1)
    assert refused_after(admission)[0] == 102
    saturated(admission, clock, 64, each=14.0)
    assert refused_after(admission)[0] == 4, "so many may always come in, and then"
    saturated(admission, clock, 64, each=0.1)
    assert refused_after(admission)[0] == 102, "it is seen that all is well again"


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
            assert fetch(live.ops_port, "GET", path).status == 200
        assert fetch(live.ops_port, "POST", "/caption", png()).status == 404


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


def test_what_never_reaches_the_engine_says_nothing_of_its_pace():
    """Images that take long to decode, or can't be, and captions between them, few and slow."""
    admission, clock = admitting(queue=100)
    with ExitStack() as others:
        for _ in range(40):
            others.enter_context(admission.enter("attacker"))
        for _ in range(64):
            with admission.enter("attacker"):
                clock.now += 2.0  # in a decoder
                with admission.engine("attacker"):
                    clock.now += 0.1
    with ExitStack() as inside:
        for _ in range(40):
            inside.enter_context(admission.enter("honest"))
            admission.check_in_time(30.0)


def test_others_queue_makes_no_request_late_that_comes_before_them():
    admission, clock = admitting(queue=100)  # two slots
    saturated(admission, clock, 64, each=1.0)
    with ExitStack() as inside:
        inside.enter_context(admission.enter("honest"))
        for n in range(10):
            client = f"greedy {n % 2}"
            inside.enter_context(admission.enter(client))
            if n < 4:
                inside.enter_context(admission.engine(client))
        inside.enter_context(admission.enter("new"))
        admission.check_in_time(8.0, "new")  # four in the engine, and one of each other client
        with pytest.raises(QueueFull, match="about 7 s") as full:
            admission.check_in_time(6.0, "new")
        assert full.value.retry_after == 7
        with pytest.raises(QueueFull, match="about 11 s"):
            admission.check_in_time(8.0, "greedy 0")


def test_a_time_without_workers_is_not_taken_for_the_engines_pace():
    admission, clock = admitting(queue=100)  # two slots
    saturated(admission, clock, 64, each=0.1)
    before = refused_after(admission)
    with ExitStack() as inside:
        for _ in range(3):  # one waits for a slot
            inside.enter_context(admission.enter())
        with ExitStack() as engine:
            for _ in range(3):
                engine.enter_context(admission.engine())
            clock.now += 20  # the worker is started again
            admission.served_again()
            clock.now += 0.1
    assert refused_after(admission) == before


def test_requests_wait_for_slots_that_fewer_of_more_rows_have():
    admission, clock = admitting(queue=100)  # two slots
    with ExitStack() as others:
        others.enter_context(admission.enter())
        others.enter_context(admission.engine(rows=2))
        for _ in range(8):
            with admission.enter(), admission.engine(rows=2):
                clock.now += 2.0
        assert refused_after(admission)[0] == 12, "13 of two seconds each, less one that is inside"


def test_a_rate_that_was_slow_can_be_seen_to_be_better():
    """If all beyond the slots were refused, nobody would ever wait, and nothing be measured."""
    admission, clock = admitting()
    saturated(admission, clock, 8, each=14.0)
    with ExitStack() as inside:
        for _ in range(2 * admission.slots):
            inside.enter_context(admission.enter())
            admission.check_in_time(30.0)
    for _ in range(2):
        saturated(admission, clock, 32, each=0.1)
    with ExitStack() as inside:
        for _ in range(50):
            inside.enter_context(admission.enter())
            admission.check_in_time(30.0)


def test_clients_have_shares_of_the_queue_and_so_has_the_next():
    admission, clock = admitting(queue=100)

    def fill(client: str, inside: ExitStack) -> int:
        for count in range(200):
            try:
                inside.enter_context(admission.enter(client))
            except QueueFull:
                return count
        raise AssertionError("all were let in")

    with ExitStack() as inside:
        assert fill("greedy", inside) == 102, "alone it has all of it"
    with ExitStack() as inside:
        inside.enter_context(admission.enter("honest"))
        assert fill("greedy", inside) == 34
        assert fill("honest", inside) == 33
        assert fill("next", inside) == 25
    with ExitStack() as inside:
        for turn in range(16 * 20):
            with suppress(QueueFull):
                inside.enter_context(admission.enter(f"greedy {turn % 16}"))
        assert admission.inside == 16 * 6
        assert fill("next", inside) == 5
    clock.now += 100  # the other client has not come for a while
    with ExitStack() as inside:
        assert fill("greedy", inside) == 102
    with ExitStack() as inside:
        inside.enter_context(admission.enter("honest"))
        for _ in range(60):  # requests that wait for the engine do not count towards the share
            inside.enter_context(admission.enter("greedy"))
            inside.enter_context(admission.engine("greedy"))
