"""What clients use together: each its share, and nobody waits for another's."""

import contextlib
from dataclasses import dataclass

import pytest

from server.fairness.byte_budget import ByteBudget
from server.fairness.errors import QueueFull
from server.fairness.token_buckets import TokenBuckets
from server.ipc.remembered import Remembered
from server.service.admission import Admission, State
from tests.fakes import fake_engine
from tests.live import png, serve

JSON = {"Content_Type": "application/json"}


def test_who_spends_more_than_it_has_waits_for_it_and_nobody_else():
    now = [0.0]
    credit = TokenBuckets(50.0, 100.0, lambda: now[0])
    assert not any(credit.spend("bad", 1) for _ in range(100))
    assert 0 < credit.spend("bad", 1) < credit.spend("bad", 1) < 0.1
    assert credit.spend("good", 1) == 0
    for _ in range(1000):
        credit.spend("bad", 1)
    assert credit.spend("bad", 1) == 5.0
    now[0] += 60
    assert credit.spend("bad", 1) == 0
    for _ in range(200):
        credit.earn("served", 1)
        assert credit.spend("served", 1) == 0
    for number in range(5000):
        credit.spend(str(number), 1)
    assert len(credit._left) == 1024


def test_a_large_body_comes_in_no_faster_than_its_client_may_send():
    with serve(fake_engine) as live:
        spent = []
        live.service.intake.spend = lambda client, size: spent.append((client, size)) or 0.03
        assert live.caption(png() + bytes(100_000)).status == 200
        assert not spent, "most images are no larger"
        assert live.caption(png() + bytes(2_000_000)).status == 200
        assert {client for client, _ in spent} == {"127.0.0.1"}
        assert 1_700_000 < sum(size for _, size in spent) < 2_000_000


def test_digests_are_remembered_for_a_while():
    now = [0.0]
    kept = Remembered(10.0, lambda: now[0])
    until = kept.add("a")
    assert "a" in kept and kept.items() == {"a": until} and not kept.expired("a")
    now[0] = 11.0
    assert "a" not in kept and kept.items() == {} and kept.expired("a")
    assert not kept.expired("a")
    for n in range(3000):
        kept.add(str(n))
    assert len(kept.items()) == 1024


@dataclass(frozen=True)
class Slow:
    client: str
    number: int


def test_who_waits_for_a_decoder_keeps_nobody_from_the_engine():
    now = [0.0]
    admission = Admission(16, 30.0, lambda: now[0])
    admission.state, admission.slots = State.READY, 2
    with contextlib.ExitStack() as held:
        for number in range(16):
            held.enter_context(admission.enter())
            held.enter_context(admission.aside(Slow("bad", number)))
        assert admission.inside == 0
        with admission.enter(), pytest.raises(QueueFull):
            held.enter_context(admission.aside(Slow("bad", 99)))
        for number in range(8):  # half of what is left
            held.enter_context(admission.enter())
            held.enter_context(admission.aside(Slow("good", number)))
        for _ in range(20):  # one now and then: the time between them is no time that one takes
            now[0] += 10
            with admission.enter():
                admission.check_in_time(1.0)
        assert admission.inside == 0
    assert admission.inside == 0


def test_a_client_holds_at_most_half_of_the_bytes_that_others_leave():
    budget = ByteBudget(1000)
    budget.hold(500, "bad")
    with pytest.raises(QueueFull):
        budget.hold(1, "bad")
    budget.hold(250, "good")
    with pytest.raises(QueueFull):
        budget.hold(1, "good")
    budget.let_go(500, "bad")
    budget.hold(250, "good")
    budget.let_go(500, "good")
    assert budget.held == 0 and not budget._by_client
