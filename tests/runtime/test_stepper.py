"""Threads and tasks that share an engine."""

import asyncio
import gc
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from queue import SimpleQueue

import numpy as np
import pytest
from msgspec.structs import replace

from runtime.async_engine import AsyncEngine
from runtime.errors import ComputationFailed, InvalidRequest, WrongThread
from runtime.observer import Observer, StepReport
from runtime.planning.config import EngineConfig
from tests.support.fakes import drained, fake_engine, gated, image
from tests.support.live import until


def test_every_thread_gets_its_own_captions():
    engine = fake_engine(EngineConfig(slots=4, patience=0))
    alone = [fake_engine().generate([image(n % 10)], ["3"])[0].token_ids for n in range(120)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: engine.generate([image(n % 10)], ["3"])[0], range(120)))
    assert [caption.token_ids for caption in found] == alone
    until(lambda: engine.idle)


def test_a_request_that_can_not_be_begun_leaves_the_engine_to_other_threads(monkeypatch):
    engine = fake_engine()
    request = engine.request(image(1))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("runtime.engine.Continuation", lambda *_: 1 / 0)
        engine.submit(request)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.submit, request).result()


class Leaves(Observer):
    def stepped(self, report):
        raise SystemExit


def test_a_caller_that_ends_its_thread_leaves_the_engine_to_others():
    engine, told = fake_engine(), SimpleQueue()

    def leaves(news):
        told.put(news)
        raise SystemExit

    engine.stepper.submit(engine.request(image(1)), leaves)
    told.get(timeout=10)
    assert len(engine.generate([image(2)])) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda engine, request: engine.submit(engine.request(image(3))),
        lambda engine, request: engine.cancel(request.id),
        lambda engine, request: engine.generate([image(3)]),
        lambda engine, request: engine.step(),
        lambda engine, request: engine.abandon(),
        lambda engine, request: asyncio.run(AsyncEngine(engine).caption(engine.request(image(3)))),
    ],
)
def test_an_observer_that_uses_the_engine_is_told_and_nobody_hangs(use):
    engine = fake_engine()
    engine.observer = Observer()
    engine.observer.admitted = lambda requests: use(engine, requests[0])
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(WrongThread, match=r"observer|callback"):
            pool.submit(engine.generate, [image(1)]).result(timeout=20)
        engine.observer = Observer()
        assert len(pool.submit(engine.generate, [image(2)]).result(timeout=20)) == 1


def test_an_observer_that_ends_its_thread_is_an_error_of_who_waits():
    engine = fake_engine()
    engine.observer = Leaves()
    with pytest.raises(ComputationFailed, match="SystemExit"):
        engine.generate([image(1)])
    engine.observer = Observer()
    assert len(engine.generate([image(2)])) == 1


@pytest.mark.parametrize(
    ("part", "values", "name"),
    [
        ("sampling", {"length_penalty": math.nan, "num_beams": 2}, "length_penalty"),
        ("sampling", {"n": 0}, "n must"),
        ("sampling", {"temperature": math.nan}, "temperature"),
        ("sampling", {"early_stopping": 1, "num_beams": 2}, "early_stopping"),
        ("scheduling", {"arrival_time": "x"}, "arrival_time"),
        ("scheduling", {"deadline": math.nan}, "deadline"),
    ],
)
def test_a_request_made_by_hand_can_not_disturb_others(part, values, name):
    engine = fake_engine()
    request = engine.request(image(1))
    odd = replace(request, **{part: replace(getattr(request, part), **values)})
    with pytest.raises(InvalidRequest, match=name):
        engine.submit(odd)


@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 16)])
def test_an_array_of_one_image_is_no_list(shape):
    with pytest.raises(InvalidRequest, match="are lists"):
        fake_engine().generate(np.zeros(shape, np.uint8))


def test_whole_captions_are_not_streamed():
    with pytest.raises(TypeError, match="stream"):
        fake_engine().generate([image(1)], stream=True)


def test_what_threads_want_at_the_same_time_is_captioned_together():
    engine = fake_engine(EngineConfig(slots=8, patience=0))
    barrier = threading.Barrier(8)

    def ask(number):
        barrier.wait()
        return [engine.generate([image(number)], max_new_tokens=8) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert max(engine.runner.steps) > 1


def test_a_step_that_fails_is_told_to_all_who_wait_and_the_next_are_served():
    engine = fake_engine()
    engine.runner.fail_next = RuntimeError("no kernel")
    with ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(engine.generate, [image(n)]) for n in range(4)]
        errors = [future.exception() for future in outcomes]
    assert any(isinstance(error, RuntimeError) for error in errors)
    assert engine.generate([image(1)]) and engine.idle


def test_one_who_asks_for_nonsense_disturbs_nobody():
    engine = fake_engine()
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(engine.generate, [image(n)]) for n in range(20)]
        bad = [pool.submit(engine.generate, [image(1)], max_new_tokens=999) for _ in range(5)]
        assert all(isinstance(future.exception(), InvalidRequest) for future in bad)
        assert all(future.result() for future in good)


def test_an_interrupted_thread_takes_its_request_back_and_leaves_the_others_theirs(monkeypatch):
    class Interrupted(SimpleQueue):
        """The queue of a thread that gets Ctrl-C while it waits."""

        def get(self):
            waits.set()
            assert come.wait(10)
            raise KeyboardInterrupt

    def ask():
        with pytest.raises(KeyboardInterrupt):
            engine.generate([image(1)])

    engine, waits, come = gated(slots=2), threading.Event(), threading.Event()
    queues = iter([Interrupted])

    def queue():
        return next(queues, SimpleQueue)()

    monkeypatch.setattr("runtime.engine.SimpleQueue", queue)
    engine.runner.open.clear()
    first = threading.Thread(target=ask)
    first.start()
    assert waits.wait(10)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(engine.generate, [image(2)])
        come.set()
        first.join(10)
        engine.runner.open.set()
        assert second.result(10)[0].token_ids == fake_engine().generate([image(2)])[0].token_ids
    until(lambda: engine.idle)


def test_submit_and_step_are_for_one_thread():
    engine = fake_engine()
    mine = engine.request(image(1))
    engine.submit(mine)
    with ThreadPoolExecutor(1) as pool:
        other = engine.request(image(2))
        for call in (lambda: engine.submit(other), engine.step,
                     lambda: engine.generate([image(2)])):  # fmt: skip
            assert isinstance(pool.submit(call).exception(), WrongThread)
        assert drained(engine).keys() == {mine.id}, "others' attempts have not disturbed it"
        assert pool.submit(engine.generate, [image(2)]).result()


def test_a_thread_that_steps_for_others_ends_when_nobody_asks(monkeypatch):
    monkeypatch.setattr("runtime.stepper._LINGER_SECONDS", 0.05)
    engine = fake_engine()
    for _ in range(2):
        assert engine.generate([image(1)])
        engine.submit(engine.request(image(2)))  # nobody waits for this request
        drained(engine)
        until(lambda: not engine.stepper._running)


def test_tasks_iterate_over_what_is_generated_for_them():
    """As many tasks as like, on several event loops; one of them stops in the middle."""
    engine = AsyncEngine(fake_engine(EngineConfig(slots=4, patience=0)))

    async def read(number: int, most: int = 20) -> tuple[int, ...]:
        asked = replace(
            engine.engine.request(image(number % 10), "3", max_new_tokens=12, ignore_eos=True),
            stream=True,
        )
        tokens: tuple[int, ...] = ()
        async with aclosing(engine.generate(asked)) as outputs:
            async for output in outputs:
                tokens += output.token_ids
                if len(tokens) >= most:
                    break
        return tokens

    async def several() -> list[tuple[int, ...]]:
        whole = [read(n) for n in range(12)]
        return (await asyncio.gather(*whole, *(read(n, 3) for n in range(4))))[:12]

    with ThreadPoolExecutor(3) as pool:
        loops = [pool.submit(asyncio.run, several()) for _ in range(3)]
        found = [loop.result(30) for loop in loops]
    alone = fake_engine()
    for n in range(12):
        [caption] = alone.generate([image(n % 10)], ["3"], max_new_tokens=12, ignore_eos=True)
        assert {tokens[n] for tokens in found} == {caption.token_ids}
    until(lambda: engine.engine.idle)


def test_event_loops_that_are_over_are_let_go():
    engine = AsyncEngine(fake_engine())

    for n in range(3):
        assert asyncio.run(engine.caption(engine.engine.request(image(n)))).token_ids

    class Slow(Observer):
        def stepped(self, report: StepReport) -> None:
            time.sleep(0.005)

    async def begin() -> None:
        request = engine.engine.request(image(1), stream=True, max_new_tokens=30, ignore_eos=True)
        await anext(engine.generate(request))

    engine.engine.observer = Slow()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    until(lambda: engine.engine.idle)  # more outputs are on the way
    loop.close()
    del loop
    engine.engine.observer = Observer()
    asyncio.run(engine.caption(engine.engine.request(image(1))))

    def let_go() -> bool:
        gc.collect()  # the stepping thread may hold the last loop for a moment
        return not engine._mailboxes

    until(let_go)


def test_a_task_is_told_what_a_step_raised_and_others_go_on():
    engine = AsyncEngine(fake_engine())
    engine.engine.runner.fail_next = RuntimeError("no kernel")

    async def ask():
        first = await asyncio.gather(
            *(engine.caption(engine.engine.request(image(n))) for n in range(2)),
            return_exceptions=True,
        )
        return first, await engine.caption(engine.engine.request(image(3)))

    first, later = asyncio.run(ask())
    assert any(isinstance(outcome, RuntimeError) for outcome in first)
    assert later.token_ids == fake_engine().generate([image(3)])[0].token_ids


def test_a_request_given_twice_is_not_cancelled_by_who_was_refused():
    engine = AsyncEngine(fake_engine())

    async def run() -> int:
        request = engine.engine.request(image(1), max_new_tokens=12, ignore_eos=True)
        first = asyncio.create_task(engine.caption(request))
        await asyncio.sleep(0)
        second = asyncio.create_task(engine.caption(request))
        await asyncio.sleep(0)
        second.cancel()
        return len((await asyncio.wait_for(first, 20)).token_ids)

    assert asyncio.run(run()) == 12


@pytest.mark.parametrize("wrong", [
    {"max_new_tokens": 3.5}, {"logprobs": 2.0}, {"n": "2"}, {"num_beams": True}, {"seed": 1.0},
    {"ignore_eos": 1}, {"temperature": "0.5"},
])  # fmt: skip
def test_a_parameter_of_another_type_disturbs_nobody(wrong):
    engine = fake_engine()
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        engine.request(image(1), **wrong)
    good = engine.request(image(1), max_new_tokens=3)
    bad = replace(good, sampling=replace(good.sampling, **wrong), id=good.id + 1)
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        engine.submit(bad)
    assert engine.generate([image(2)], max_new_tokens=np.int64(4), length_penalty=None)
