"""What of a model's slots one client may have."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.request import Priority
from server.fairness.present_clients import PresentClients, shared
from server.fairness.slot_shares import SlotShares
from server.service.service import Service

SLOTS = 8


class Scene:
    """Requests that hold their slots until the test ends them."""

    def __init__(self, linger: float = 0.0) -> None:
        self.now = 100.0
        clock = lambda: self.now + asyncio.get_running_loop().time()  # noqa: E731
        self.shares = SlotShares(PresentClients(linger, clock), clock)
        self.shares.slots = SLOTS
        self.inside: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task] = {}

    async def come(
        self, name: str, client: str, rows: int, batch: bool = False, model: str = "a"
    ) -> None:
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, client, rows, batch, model))
        await self.settle()

    async def _hold(self, name: str, client: str, rows: int, batch: bool, model: str) -> None:
        priority = Priority.BATCH if batch else Priority.INTERACTIVE
        async with self.shares.take(client, rows, priority, model):
            self.inside.append(name)
            try:
                await self.ends[name].wait()
            finally:
                self.inside.remove(name)

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(4):
            await asyncio.sleep(0)


def scenario(test):
    def run() -> None:
        asyncio.run(test(Scene()))

    run.__name__ = test.__name__
    return run


@scenario
async def test_a_client_that_is_alone_has_all_and_half_as_many_in_front_of_the_engine(scene):
    for n in range(20):
        await scene.come(f"a{n}", "a", 3)
    assert 3 * len(scene.inside) == SLOTS * 3 // 2
    await scene.end("a0")
    assert "a4" in scene.inside


@scenario
async def test_half_is_one_clients_while_another_is_here(scene):
    await scene.come("b", "b", 1)
    for n in range(6):
        await scene.come(f"a{n}", "a", 2)
    assert scene.inside == ["b", "a0", "a1"]
    await scene.end("a0")
    assert scene.inside == ["b", "a1", "a2"]
    await scene.end("b")  # a is alone again
    assert len(scene.inside) == 5


def test_who_was_here_a_moment_ago_counts():
    async def run() -> None:
        scene = Scene(linger=0.2)
        await scene.come("b", "b", 1)
        await scene.end("b")
        for n in range(6):
            await scene.come(f"a{n}", "a", 2)
        assert scene.inside == ["a0", "a1"], "b's next request finds room"
        await asyncio.sleep(0.3)
        assert len(scene.inside) == 6, "and if none comes, nothing is held back"

    asyncio.run(run())


@scenario
async def test_one_request_may_take_more_than_its_clients_share(scene):
    """Once its slots are free: in the engine all others would wait for that, too."""
    await scene.come("b", "b", 1)
    await scene.come("a0", "a", 8)
    await scene.come("a1", "a", 1)
    await scene.come("c", "c", 1)
    assert scene.inside == ["b"]
    await scene.end("b")
    assert scene.inside == ["a0", "c"]


@scenario
async def test_a_client_whose_requests_take_much_waits_for_others_that_took_little(scene):
    for name in ("x", "y"):
        await scene.come(name, name, 8)
    await scene.come("h", "h", 1)
    scene.now += 1.0
    await scene.end("x")
    assert scene.inside == ["y", "h"]
    await scene.end("h")
    await scene.come("x1", "x", 8)
    for n in range(5):
        await scene.come(f"h{n}", "h", 2)  # after x1, whose client has used eight times as much
    scene.now += 1.0
    await scene.end("y")
    for n in range(5):
        assert scene.inside == [f"h{n}"]
        scene.now += 0.1
        await scene.end(f"h{n}")
    assert scene.inside == ["x1"]


@scenario
async def test_a_request_that_is_taken_back_counts_as_what_is_usual(scene):
    await scene.come("b", "b", 1)  # holds its slot throughout
    await scene.come("z", "z", 4)
    scene.now += 2.0
    await scene.end("z")
    for n in range(4):
        await scene.come(f"l{n}", "leaver", 1)
        scene.tasks[f"l{n}"].cancel()
        await scene.settle()
    await scene.come("h0", "h", 1)
    scene.now += 0.5
    await scene.end("h0")
    await scene.come("y", "y", 7)
    await scene.come("l4", "leaver", 7)
    await scene.come("h1", "h", 7)
    await scene.end("y")
    assert scene.inside == ["b", "h1"]


@scenario
async def test_a_clients_interactive_requests_come_before_its_others(scene):
    await scene.come("b", "b", 1)
    await scene.come("a0", "a", 4)
    await scene.come("slow", "a", 1, batch=True)
    await scene.come("soon", "a", 1)
    await scene.end("a0")
    assert scene.inside == ["b", "soon", "slow"]


@scenario
async def test_who_gives_up_leaves_nothing_behind(scene):
    await scene.come("b", "b", 1)
    await scene.come("a0", "a", 4)
    await scene.come("a1", "a", 4)
    scene.tasks["a1"].cancel()
    scene.tasks["a0"].cancel()
    await scene.settle()
    await scene.end("b")
    assert not scene.shares._taken and not scene.shares._waiting


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.booleans()), max_size=20),
    st.randoms(use_true_random=False),
)
def test_everybody_comes_in_at_last(asked, random):
    async def run() -> None:
        scene = Scene()
        for n, (client, rows, batch) in enumerate(asked):
            await scene.come(str(n), client, rows, batch)
        ended = 0
        while scene.inside:
            await scene.end(random.choice(scene.inside))
            ended += 1
        assert ended == len(asked)
        assert not scene.shares._taken

    asyncio.run(run())


@pytest.mark.parametrize("threads", [0, 1])
def test_models_of_one_device_share_its_slots_unless_each_has_cores_of_its_own(threads):
    models = {
        name: SimpleNamespace(
            name=name, device=device, serves=True, admission=SimpleNamespace(slots=slots)
        )
        for name, device, slots in [("a", "cpu", 16), ("b", "cpu", 8), ("c", "gpu 0", 64)]
    }
    service = SimpleNamespace(
        models=models, shares={}, present=None, index=0, settings=SimpleNamespace(threads=threads)
    )
    for _ in range(2):  # workers come and go
        Service.share_devices(service)
    a, b, c = (model.shares for model in models.values())
    assert (a is b) == (not threads)
    assert (a.slots, a.models) == ((16, 1) if threads else (16, 2))
    assert (c.slots, c.models) == (64, 1)


@scenario
async def test_a_model_without_a_worker_keeps_no_slots_from_another(scene):
    """Neither with requests that its worker had when it died, nor with those that come then."""
    scene.shares.models = 2
    for n in range(SLOTS):
        await scene.come(f"b{n}", "attacker", 1, model="b")
    scene.shares.serve("b", False)
    for n in range(SLOTS, 2 * SLOTS):
        await scene.come(f"b{n}", "attacker", 1, model="b")
    for n in range(2 * SLOTS):
        await scene.come(f"a{n}", "honest", 1)
    came = [name for name in scene.inside if name[0] == "a"]
    assert len(came) == SLOTS + 4, "as if alone: who waits for the dead model is not present"
    scene.tasks["b0"].cancel()
    await scene.settle()
    scene.shares.serve("b", True)
    for n in range(2 * SLOTS):
        await scene.end(f"a{n}")
    assert [name for name in scene.inside if name[0] == "b"][SLOTS:], "some more came in"
    for n in range(1, 2 * SLOTS):
        await scene.end(f"b{n}")
    assert all(task.done() for task in scene.tasks.values())
    assert not scene.shares._taken and not scene.shares._holding and not scene.shares._waiting


@pytest.mark.parametrize("others", [0, 1, 3])
def test_clients_of_other_front_ends_count_too(tmp_path, others):
    """Else who is alone in a front-end of its own would have half of the engine."""

    async def run() -> None:
        now = 100.0
        [mine], [theirs] = (shared(tmp_path / "clients", 2, 1) for _ in range(2))
        scene = Scene()
        scene.shares = SlotShares(PresentClients(1.0, lambda: now, mine, 0), lambda: now)
        scene.shares.slots = SLOTS
        elsewhere = PresentClients(1.0, lambda: now, theirs, 1)
        for n in range(others):
            elsewhere.came(f"h{n}")
            elsewhere.came("a")  # still one client, though at two front-ends
        for n in range(30):
            await scene.come(f"a{n}", "a", 1)
        assert len(scene.inside) == {0: 24, 1: 8, 3: 6}[others], "slots of idle ones are lent"
        for n in range(others):
            elsewhere.left(f"h{n}")
        now += 2.0
        await scene.end("a0")
        lent = 0 if others else 12  # `a` is there, too
        assert len(scene.inside) == 12 + lent, "once they have been away for a while"
        elsewhere.came("h")
        PresentClients(1.0, lambda: now, theirs, 1)  # restart of that front-end
        assert PresentClients(1.0, lambda: now, mine.copy(), 1).count() == 1

    asyncio.run(run())


def test_a_client_has_its_share_in_all_front_ends_together(tmp_path):
    async def run() -> None:
        [mine], [theirs] = (shared(tmp_path / "clients", 2, 1) for _ in range(2))
        scene = Scene()
        scene.shares = SlotShares(PresentClients(records=mine, index=0))
        scene.shares.slots = SLOTS
        elsewhere = PresentClients(records=theirs, index=1)
        elsewhere.came("h")
        elsewhere.came("a")
        elsewhere.has("a", 7)  # of the 8 that are half of all slots
        for n in range(4):
            await scene.come(f"a{n}", "a", 1)
        assert scene.inside == ["a0"]
        await scene.come("h", "h", 1)
        assert scene.inside == ["a0", "h"]
        await scene.end("a0")
        elsewhere.has("a", 20)
        await asyncio.sleep(0.1)
        assert scene.inside == ["h", "a1"], "one is left here, or its connections here would starve"
        await scene.come("a8", "a", 8)
        elsewhere.has("a", 5)
        await asyncio.sleep(0.1)
        assert scene.inside == ["h", "a1", "a2", "a3"]

    asyncio.run(run())


def test_clients_that_are_not_told_of_get_their_turns_when_the_others_have_left():
    async def run() -> None:
        scene = Scene(linger=1.0)
        for n in range(100):
            await scene.come(f"r{n}", f"c{n}", 1)
        for n in range(64):
            await scene.end(f"r{n}")
        scene.now += 10.0
        for n in range(64, 100):
            assert f"r{n}" in scene.inside
            await scene.end(f"r{n}")
        await asyncio.gather(*scene.tasks.values())

    asyncio.run(run())


def test_more_clients_than_are_told_of_are_counted_as_those():
    now = 0.0
    clients = PresentClients(1.0, lambda: now)
    for n in range(100):
        clients.came(str(n))
    assert clients.count() == 64
    for n in range(60):
        clients.left(str(n))
    now = 2.0
    assert clients.count() == 4
    for n in range(100, 110):
        clients.came(str(n))
    assert clients.count() == 14
