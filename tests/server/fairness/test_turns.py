"""Places that clients take in turns: of equal time, whoever comes and however often."""

import asyncio
import time
from collections import Counter
from unittest.mock import Mock

import pytest

from server.fairness.equal_shares import EqualShares
from server.fairness.fair_queue import FairQueue
from server.fairness.patient_queue import PatientQueue


def taken(costs: dict[str, float], turns: int) -> dict[str, int]:
    """How often each client got a place, if all always want one."""

    async def run() -> dict[str, int]:
        places, had = FairQueue(1), dict.fromkeys(costs, 0)

        async def client(name: str, number: int) -> None:
            while True:
                await places.take(name)
                had[name] += 1
                await asyncio.sleep(0)
                places.give(name, costs[name])

        tasks = [asyncio.create_task(client(name, n)) for name in costs for n in range(4)]
        while sum(had.values()) < turns:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return had

    return asyncio.run(run())


def test_turns_are_of_equal_time_and_not_of_equal_number():
    had = taken({"expensive": 0.13, "cheap": 0.005, "also cheap": 0.005}, 600)
    assert had["expensive"] < 20
    assert had["cheap"] == pytest.approx(had["also cheap"], abs=3)


def test_who_sends_one_by_one_has_equal_time_beside_who_sends_several_that_take_long():
    """Else each of theirs would begin in the moment between two of its own."""
    had = {"heavy": 0.0, "one by one": 0.0}

    async def run() -> float:
        places = PatientQueue(0.3)

        async def client(name: str, cost: float, times: int) -> None:
            for _ in range(times):
                await places.take(name)
                await asyncio.sleep(cost / 500)
                had[name] += cost
                places.give(name, cost)
                await asyncio.sleep(0.001)

        heavy = [asyncio.create_task(client("heavy", 7.0, 1000)) for _ in range(4)]
        await client("one by one", 0.5, 200)
        ratio = had["heavy"] / had["one by one"]
        before = had["heavy"]
        await asyncio.sleep(0.35)
        assert had["heavy"] > before  # the other is no longer expected
        for task in heavy:
            task.cancel()
        return ratio

    assert asyncio.run(run()) < 1.5


def test_the_time_for_which_a_place_is_kept_counts():
    """A client that asks for little, and late, must not keep the place empty for all others."""
    had = Counter()

    async def run() -> None:
        places = PatientQueue(0.1)

        async def client(name: str, cost: float, pause: float) -> None:
            while True:
                await places.take(name)
                began = time.monotonic()
                await asyncio.sleep(cost)
                took = time.monotonic() - began
                had[name] += took
                places.give(name, took)
                await asyncio.sleep(pause)

        tasks = [asyncio.create_task(client("heavy", 0.3, 0)) for _ in range(3)]
        tasks.append(asyncio.create_task(client("light", 0.001, 0.08)))
        await asyncio.sleep(6)
        for task in tasks:
            task.cancel()

    asyncio.run(run())
    assert had["heavy"] > 2  # of 6; 0.3 if the time were free


def test_a_client_that_gave_up_is_not_expected():
    async def run() -> None:
        places = PatientQueue(60)
        for name in ("hasty", "heavy"):
            await places.take(name)
            places.give(name, 1.0)
        await places.take("heavy")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await places.take("hasty")  # it has returned once
        places.give("heavy", 5.0)
        await asyncio.wait_for(places.take("heavy"), 10)

    asyncio.run(run())


def test_turns_that_cost_the_same_are_of_equal_number():
    had = taken({"a": 1.0, "b": 1.0, "c": 1.0}, 300)
    assert max(had.values()) - min(had.values()) <= 2


def test_a_client_that_was_away_has_saved_nothing():
    async def run() -> list[str]:
        places, order = FairQueue(1), []
        await places.take("busy")

        async def client(name: str) -> None:
            await places.take(name)
            order.append(name)
            places.give(name, 1.0)

        for _ in range(100):
            places.give("busy", 1.0)
            await places.take("busy")
        names = ["busy", "away", "away", "away", "busy", "away", "busy"]
        tasks = [asyncio.create_task(client(name)) for name in names]
        await asyncio.sleep(0)
        places.give("busy", 1.0)
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(run())
    assert order[0] == "away"
    assert order.index("busy") <= 2


def test_beside_others_a_client_has_some_of_the_places_only():
    async def run() -> list[str]:
        clock = [100.0]
        places, order = FairQueue(4, beside=2, clock=lambda: clock[0]), []

        async def take(name: str) -> None:
            await places.take(name)
            order.append(name)

        tasks = [asyncio.create_task(take("lone")) for _ in range(3)]
        await asyncio.sleep(0)
        assert order == ["lone"] * 3, "nobody else is there"
        for _ in range(3):
            places.give("lone")
        tasks += [asyncio.create_task(take(name)) for name in ("other", "lone", "lone", "lone")]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return order[3:]

    assert asyncio.run(run()) == ["other", "lone", "lone"]


def test_who_is_new_all_the_time_does_not_go_before_those_who_were_there():
    async def run() -> int:
        places, had = FairQueue(1), 0

        async def steady() -> None:
            nonlocal had
            while True:
                await places.take("steady")
                had += 1
                await asyncio.sleep(0)
                places.give("steady", 0.01)

        async def newcomer(number: int) -> None:
            await places.take(f"new {number}")
            await asyncio.sleep(0)
            places.give(f"new {number}", 0.01)

        tasks = [asyncio.create_task(steady())]
        for number in range(400):  # two arrive per one served
            tasks.append(asyncio.create_task(newcomer(number)))
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return had

    assert asyncio.run(run()) >= 5


def test_one_share_of_the_places_is_left_to_the_next_client_where_that_is_wished():
    async def run() -> list[str]:
        turns, taken = EqualShares(8), []

        async def take(client: str) -> None:
            await turns.take(client)
            taken.append(client)

        tasks = [asyncio.create_task(take(client)) for client in "aaaaaa" + "bbbb" + "c"]
        await asyncio.sleep(0)
        assert not turns.call_back("a", "d"), "one place is free"
        tasks.append(asyncio.create_task(take("d")))
        await asyncio.sleep(0)
        assert not turns.call_back("a"), "who waits has its share"
        assert [turns.call_back("a", "e") for _ in range(3)] == [True, False, False], "one waits"
        turns.give("a", called=True)
        turns.give("b")
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return taken

    assert asyncio.run(run()) == list("aaaabbcd")


def test_hundreds_of_clients_that_wait_are_looked_through_once():
    """Not once for each of them, on the event loop."""

    async def run() -> int:
        turns = EqualShares(32)
        tasks = [asyncio.create_task(turns.take(str(n))) for n in range(300)]
        await asyncio.sleep(0)
        turns._share = counted = Mock(wraps=turns._share)
        assert turns.call_back("0", "newcomer")
        turns.give("0", called=True)
        for task in tasks:
            task.cancel()
        return counted.call_count

    assert asyncio.run(run()) <= 4
