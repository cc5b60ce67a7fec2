"""Images that take long to decode wait for one another, and clients take turns."""

import asyncio
import time

import pytest

from server.fairness.token_buckets import TokenBuckets
from server.images import lane
from server.images.cost import TooHard
from server.images.lane import DecodeTask, LeftQuickLane, OutOfTime
from server.refusals import QueueFull
from tests.support.decoders import decode, expensive, job, new_store, pool
from tests.support.live import png


@pytest.fixture
def store(tmp_path):
    return new_store(tmp_path)


def test_expensive_images_wait_for_one_another_and_nobody_for_them(store):
    decoders = pool(store, pixels=20_000_000)
    decode(decoders, png())
    order = []

    async def one(image, slot, name, client="somebody"):
        await decoders.decode(job(image, slot, client))
        order.append(name)

    async def run():
        slow = [asyncio.create_task(one(expensive(3500 + n), 0, "expensive")) for n in range(3)]
        await asyncio.sleep(0.2)
        await asyncio.gather(*(one(png((n, n, n)), 1, "usual") for n in range(5)))
        await asyncio.gather(*slow)

    asyncio.run(run())
    assert order == ["usual"] * 5 + ["expensive"] * 3
    decoders.close()


def test_clients_take_turns(store):
    decoders = pool(store)
    decode(decoders, png())
    order = []

    async def one(client, number):
        await decoders.decode(job(png((number, 1, 1)), 0, client))
        order.append(client)

    async def run():
        many = [asyncio.create_task(one("many", n)) for n in range(6)]
        await asyncio.sleep(0)
        await one("few", 100)
        await asyncio.gather(*many)

    asyncio.run(run())
    assert order.index("few") <= 2
    decoders.close()


def test_expensive_images_that_can_not_be_decoded_in_time_are_refused_at_once(store):
    decoders = pool(store, pixels=20_000_000)
    with pytest.raises(QueueFull) as full:
        decode(decoders, expensive(4000), seconds=0.25)
    assert full.value.retry_after >= 1
    decoders.close()


def test_a_pace_that_was_slow_once_does_not_refuse_what_finds_nobody_waiting(store):
    decoders = pool(store, pixels=20_000_000)
    decoders._pace = 1000.0
    decode(decoders, expensive(4000), seconds=20)
    assert decoders._pace < 1000
    decoders.close()


def test_an_image_that_ends_soon_after_its_deadline_costs_no_process(store, monkeypatch):
    monkeypatch.setattr(lane, "_GRACE_SECONDS", 60.0)
    decoders = pool(store)
    decode(decoders, png())
    [decoder], before = decoders._quick._idle, decoders.pids
    task = DecodeTask(b"P", png(), 1.0, 60.0, until=time.perf_counter() + 1)
    real = decoder.ask

    async def late(*asked):
        await asyncio.sleep(task.until - time.perf_counter() + 0.1)
        return await real(*asked)

    monkeypatch.setattr(decoder, "ask", late)
    assert asyncio.run(decoders._quick._attempt(task))
    assert decoders.pids == before
    decoders.close()


def test_what_is_too_late_once_a_process_is_ready_is_not_begun(store):
    decoders = pool(store)

    async def late():
        lane, task = decoders._quick, DecodeTask(b"P", png(), 1.0, 1.0, until=time.perf_counter())
        with pytest.raises(TimeoutError):
            await lane._attempt(task)

    before = decoders.pids
    asyncio.run(late())
    assert decoders.pids == before
    decode(decoders, png())
    decoders.close()


def test_a_pace_is_learnt_from_what_was_not_in_time(store):
    decoders = pool(store, pixels=20_000_000)

    async def late(client, task):
        task.begun()
        await asyncio.sleep(0.1)
        raise TimeoutError

    decoders._slow.ask = late
    for pace in (0.01, 3.0):
        decoders._pace = pace
        with pytest.raises(QueueFull):
            decode(decoders, expensive(4000))
        assert decoders._pace > 0.02
    assert decoders._pace == 3.0, "it took that at least"
    decoders.close()


def test_an_image_whose_time_is_over_before_it_is_decoded_is_no_bad_one(store, monkeypatch):
    monkeypatch.setattr(lane, "_GRACE_SECONDS", 0.0)
    decoders = pool(store, pixels=20_000_000)
    decode(decoders, png())
    decoders._pace = 0.01  # it seems to be in time
    with pytest.raises(QueueFull):
        decode(decoders, expensive(4000), seconds=0.1)
    decode(decoders, expensive(4000))
    decoders.close()


def test_an_image_that_takes_too_long_is_remembered(store):
    decoders = pool(store, seconds=0.05, pixels=20_000_000)
    with pytest.raises(TooHard, match="took too long"):
        decode(decoders, expensive(4000))
    before = decoders.pids
    with pytest.raises(TooHard, match="took too long"):
        decode(decoders, expensive(4000))
    assert decoders.pids == before, "it was not tried again"
    decoders.close()


def test_a_client_whose_images_take_longer_than_they_look_waits_with_the_expensive_ones(store):
    decoders, asked = pool(store), []

    async def out_of_time(client, task):
        if task.leaves():
            raise LeftQuickLane
        asked.append(client)
        raise OutOfTime

    decoders._quick.ask = out_of_time
    for n in range(5):
        decode(decoders, png((n, 2, 3)), client="deceiver")
    assert asked == ["deceiver"] * 3
    assert decoders._pace == 1, "nobody knew how long these would take"
    decode(decoders, png((9, 9, 9)), client="another")
    assert asked[3:] == ["another"]
    decoders.close()


def test_images_that_wait_already_when_a_client_is_found_out_wait_with_the_expensive_ones(store):
    """A whole burst that was let in is not decoded before anybody looks."""
    decoders, asked = pool(store), []
    real = decoders._quick._ask

    async def expensive(client, task):
        asked.append(client)
        kind, _ = await real(client, task)
        return kind, b"0.6"  # seconds more than estimated

    decoders._quick._ask = expensive

    async def burst():
        jobs = [job(png((n, 2, 3)), n % 4, client="deceiver") for n in range(12)]
        await asyncio.gather(*(decoders.decode(each) for each in jobs))

    asyncio.run(burst())
    assert len(asked) <= 4
    decoders.close()


def test_what_a_client_owes_for_images_that_deceived_is_not_forgotten_at_once():
    now = [0.0]
    credit = TokenBuckets(1 / 60, 2.0, lambda: now[0], longest=600.0)
    for _ in range(60):
        credit.spend("deceiver", 1)
    now[0] = 300.0
    assert credit.owed("deceiver")
    now[0] = 700.0
    assert not credit.owed("deceiver")
