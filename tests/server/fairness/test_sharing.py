"""What clients use together: each its share, and nobody waits for another's."""

import asyncio
import contextlib
from dataclasses import dataclass

import pytest

from server.fairness.byte_budget import ByteBudget, Incoming
from server.fairness.token_buckets import TokenBuckets
from server.ipc.remembered import Remembered
from server.refusals import QueueFull
from server.service.admission import Admission, State
from tests.support.fakes import fake_engine
from tests.support.live import png, serve


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


def test_who_owes_is_not_forgotten_for_those_that_are_only_asked_about():
    buckets = TokenBuckets(1.0, 1.0, lambda: 0.0)
    buckets.spend("debtor", 3)
    assert not any(buckets.owed(str(n)) for n in range(5000))
    assert buckets.owed("debtor") == 2


def test_a_large_body_comes_in_no_faster_than_its_client_may_send():
    with serve(fake_engine) as live:
        spent = []
        live.service.rates.uploads.spend = lambda client, size: spent.append((client, size)) or 0.03
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

    async def run():
        async with contextlib.AsyncExitStack() as held:
            for number in range(16):
                held.enter_context(admission.enter())
                await held.enter_async_context(admission.aside(Slow("bad", number)))
            assert admission.inside == 0
            with admission.enter(), pytest.raises(QueueFull):
                await held.enter_async_context(admission.aside(Slow("bad", 99)))
            for number in range(8):  # half of the remaining places
                held.enter_context(admission.enter())
                await held.enter_async_context(admission.aside(Slow("good", number)))
            for _ in range(20):  # one now and then: idle time between requests is no service time
                now[0] += 10
                with admission.enter():
                    admission.check_in_time(1.0)
            assert admission.inside == 0

    asyncio.run(run())
    assert admission.inside == 0


def test_who_waits_for_images_of_slow_sites_keeps_nobody_from_the_engine():
    admission = Admission(16, 30.0)
    admission.state, admission.slots = State.READY, 2

    async def run():
        async with contextlib.AsyncExitStack() as held:
            for number in range(256):
                held.enter_context(admission.enter(f"slow{number}"))
                await held.enter_async_context(admission.fetching(f"slow{number}"))
            with admission.enter("slow"), pytest.raises(QueueFull, match="being fetched"):
                await held.enter_async_context(admission.fetching("slow"))
            for _ in range(8):
                held.enter_context(admission.enter("honest"))
            assert (admission.inside, admission.accepted) == (8, 264)
            admission.state = State.DRAINING

    asyncio.run(run())
    assert admission.accepted == 0


@pytest.mark.parametrize(
    ("aside", "of_each"),
    [
        (lambda admission, client, number: admission.fetching(client), (128, 85, 43)),
        (lambda admission, client, number: admission.aside(Slow(client, number)), (16, 10, 6)),
    ],
)
def test_who_came_early_makes_room_for_who_has_fewer_aside(aside, of_each):
    admission = Admission(1000, 30.0)
    admission.state, admission.slots = State.READY, 2
    over, ended = asyncio.Event(), []

    async def ask(client: str, number: int) -> None:
        try:
            with admission.enter(client):
                async with aside(admission, client, number):
                    await over.wait()
        except QueueFull:
            ended.append((client, number))

    async def run():
        asked = []
        for client, count in zip("abc", of_each, strict=True):
            asked += [asyncio.ensure_future(ask(client, number)) for number in range(count)]
            await asyncio.sleep(0)
        for number in range(3):
            asked.append(asyncio.ensure_future(ask("honest", number)))
            await asyncio.sleep(0.01)
        over.set()
        await asyncio.gather(*asked)

    asyncio.run(run())
    assert ended == [("a", of_each[0] - number) for number in (1, 2, 3)]
    assert admission.accepted == 0


def test_all_frames_of_a_request_make_room_at_once():
    admission = Admission(1000, 30.0)
    admission.state, admission.slots = State.READY, 2
    ended = []

    async def frame(request: Slow) -> None:
        try:
            async with admission.aside(request):
                await asyncio.Event().wait()
        except QueueFull:
            ended.append(request)

    async def wait(request: Slow) -> None:
        with admission.enter(request.client):
            await asyncio.gather(*(frame(request) for _ in range(3)))

    async def run():
        requests = [Slow("a", number) for number in range(16)]
        requests += [Slow("b", number) for number in range(10)]
        requests += [Slow("c", number) for number in range(6)]
        tasks = [asyncio.ensure_future(wait(request)) for request in requests]
        await asyncio.sleep(0.01)
        assert (admission.inside, admission.accepted) == (0, 32)
        with admission.enter("d"):
            async with admission.aside(Slow("d", 0)):
                await asyncio.sleep(0.01)
                assert ended == 3 * [Slow("a", 15)]
                assert (admission.inside, admission.accepted) == (0, 32)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert admission.accepted == 0


def test_what_was_fetched_needs_room_in_the_queue():
    admission = Admission(1, 30.0)
    admission.state, admission.slots = State.READY, 2

    async def run():
        with contextlib.ExitStack() as held:
            with admission.enter("a"), pytest.raises(QueueFull, match="the queue is full"):
                async with admission.fetching("a"):
                    for client in "bcd":
                        held.enter_context(admission.enter(client))
            assert admission.inside == 3

    asyncio.run(run())
    assert admission.accepted == 0


def test_bodies_that_stop_in_the_middle_make_room_for_those_of_who_has_less():
    now, closed = [0.0], []
    budget = ByteBudget(1_000_000, lambda: now[0])

    def come(client: str, size: int) -> Incoming:
        body = budget.begin(client, lambda: (closed.append(client), budget.release(size, client)))
        budget.hold(size, client, body)
        return body

    for client, size in {"a": 500_000, "b": 250_000, "c": 125_000, "d": 62_500}.items():
        come(client, size)
    with pytest.raises(QueueFull):
        come("good", 60_000)  # no body has stalled yet
    now[0] += 1.5
    with pytest.raises(QueueFull):
        come("b", 260_000)  # "a" holds less than "b" would
    assert not closed
    come("good", 60_000)
    assert closed == ["a"]


@pytest.mark.parametrize(("piece", "closed"), [(70_000, False), (10_000, True)])
def test_a_body_that_goes_on_coming_is_left_alone(piece, closed):
    now, gone = [0.0], []
    budget = ByteBudget(1_000_000, lambda: now[0])
    body = budget.begin("a", lambda: (gone.append("a"), budget.release(100_000 + 4 * piece, "a")))
    budget.hold(100_000, "a", body)
    for _ in range(4):
        now[0] += 0.9
        budget.hold(piece, "a", body)
    budget.hold_answer(1_000_000, "b")
    now[0] += 0.5
    with contextlib.suppress(QueueFull):
        budget.hold(1000, "c")
    assert bool(gone) == closed


def test_one_client_of_many_that_send_much_has_a_part_of_the_rate():
    now = [0.0]
    credit = TokenBuckets(100.0, 100.0, lambda: now[0], total=100.0)
    assert credit.spend("a", 100) == 0
    assert credit.spend("b", 50) == 0, "half as much"
    assert credit.spend("b", 50) == 1.0
    now[0] += 5
    assert credit.spend("a", 100) == 0, "who spent long ago does not count"


def test_who_trickles_does_not_divide_the_rate_with_those_that_send_much():
    now = [0.0]
    credit = TokenBuckets(100.0, 100.0, lambda: now[0], total=100.0, least=10.0)
    for number in range(32):
        assert credit.spend(f"trickling {number}", 1) == 0
    assert credit.spend("a", 100) == 0
    for _ in range(9):
        credit.spend("trickling 0", 1)
    assert credit.spend("b", 50) == 0.5, "three divide it once one of them has spent enough"


def test_all_together_have_no_more_than_a_total():
    now = [0.0]
    credit = TokenBuckets(10.0, 10.0, lambda: now[0], total=20.0)
    assert credit.spend("a", 10) == 0
    assert credit.spend("b", 10) == 0, "two have their own rates"
    for client in "xyz":
        assert credit.spend(client, 0) == 0, "who spends nothing does not count"
    for client in "cd":
        credit.spend(client, 1)
    assert credit.spend("e", 10) == 1.5, "five have two fifths"


def test_a_client_holds_at_most_half_of_the_bytes_that_others_leave():
    budget = ByteBudget(1000)
    budget.hold(500, "bad")
    with pytest.raises(QueueFull):
        budget.hold(1, "bad")
    budget.hold(250, "good")
    with pytest.raises(QueueFull):
        budget.hold(1, "good")
    budget.release(500, "bad")
    budget.hold(250, "good")
    budget.release(500, "good")
    assert budget.held == 0 and not budget._by_client
