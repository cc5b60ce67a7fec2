"""Threads and tasks that share an engine, and the forms in which they pass images."""

import asyncio
import gc
import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from queue import SimpleQueue
from unittest.mock import Mock

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from runtime.async_engine import AsyncEngine
from runtime.engine import Engine
from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels, WrongThread
from runtime.execution.host import HostRunner
from runtime.planning.config import EngineConfig
from tests.conftest import DEMO, ROOT, SAMPLES
from tests.fakes import drained, fake_engine, gated, image
from tests.live import until


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


def test_images_may_be_paths_arrays_and_pictures(demo):
    path = SAMPLES / "owl.png"
    picture = Image.open(path)
    transparent = picture.convert("RGBA")
    forms = [path, str(path), path.read_bytes(), picture, transparent, np.asarray(picture)]
    captions = demo.generate(forms)
    assert {caption.text for caption in captions} == {"an owl on a purple background"}
    buffer = io.BytesIO()
    picture.convert("L").save(buffer, "PNG")
    grey = np.asarray(picture.convert("L"))
    assert demo.generate([grey])[0].text == demo.generate([buffer.getvalue()])[0].text


@pytest.mark.parametrize(
    "line", [Image.new("RGB", (1, 60_000)), np.zeros((200_000, 1, 3), np.uint8)]
)
def test_a_line_of_pixels_is_not_blown_up(demo, line):
    with pytest.raises(TooManyPixels, match="far longer than wide"):
        demo.request(line)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Image.new("RGB", (0, 3)), "image 2: the image is empty"),
        (b"hello", "image 2: not an image"),
        ("no/such.png", r"image 2 \(no/such.png\)"),
        (np.zeros((4, 4, 3)), "image 2: an array of float64"),
        (np.zeros((0, 4, 3), np.uint8), "image 2: an array"),
        (7, "image 2: int is no image"),
    ],
)
def test_an_error_names_the_image(wrong, message):
    with pytest.raises(InvalidImage, match=message):
        fake_engine().generate([image(1), wrong])


@pytest.mark.parametrize("given", [
    ["no/such.png"], [Path("no/such.png")], [b"?"], [Image.new("RGB", (3, 3))],
    [[image(1)], "how many"],
])  # fmt: skip
def test_one_image_or_prompt_in_place_of_a_list_is_told(given):
    with pytest.raises(InvalidRequest, match="lists"):
        fake_engine().generate(*given)


def test_a_request_may_be_of_a_file_and_stream(demo):
    async def read():
        request = demo.request(SAMPLES / "owl.png", stream=True)
        return [output async for output in AsyncEngine(demo).generate(request)], request

    outputs, request = asyncio.run(read())
    assert len(outputs) > 3
    assert demo.caption(request, *outputs).text == "an owl on a purple background"


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


def test_an_engine_is_opened_and_stepped_on_one_thread_whatever_the_pauses(monkeypatch):
    """On a GPU each thread would capture its graphs anew."""
    monkeypatch.setattr("runtime.stepper._LINGER_SECONDS", 0.05)
    threads = []
    for name in ("warm_up", "encode", "decode"):
        real = getattr(HostRunner, name)

        def noted(self, *given, real=real, **named):
            threads.append(threading.get_ident())
            return real(self, *given, **named)

        monkeypatch.setattr(HostRunner, name, noted)
    engine = Engine.open(DEMO, EngineConfig(provider="cpu", slots=2))
    for _ in range(2):
        assert engine.generate([SAMPLES / "owl.png"])
        until(lambda: not engine.stepper._running)
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_an_engine_that_nobody_has_any_more_takes_its_thread_along():
    engine = fake_engine()
    assert engine.generate([image(1)])
    thread = engine.stepper.thread.call(threading.current_thread)
    del engine
    gc.collect()
    until(lambda: not thread.is_alive())


def test_a_sink_that_raises_is_logged_and_the_thread_serves_on(caplog):
    engine = fake_engine()
    told = threading.Event()

    def sink(_):
        told.set()
        raise ZeroDivisionError

    engine.stepper.submit(engine.request(image(1)), sink)
    assert told.wait(20)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.generate, [image(3)]).result(20)
    assert "ZeroDivisionError" in caplog.text


_ENDS = """
import sys, threading, time
from runtime.engine import Engine

def ask():
    while True:
        engine.generate([image] * 8)

engine, image = Engine.open(sys.argv[1]), sys.argv[2]
for _ in range(3):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.5)
sys.exit(3)
"""


def test_a_program_may_end_while_its_engine_steps():
    """ONNX Runtime aborts a process whose interpreter goes away below one of its calls."""
    program = [sys.executable, "-c", _ENDS, str(DEMO), str(SAMPLES / "owl.png")]
    for _ in range(3):
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 3, done.stderr


_LATE = """
import atexit, sys

@atexit.register
def late():
    try:
        engine.generate([sys.argv[2]])
    except Exception as error:
        print(error)

from runtime.engine import Engine
engine = Engine.open(sys.argv[1])
"""


def test_who_asks_as_the_program_ends_is_told():
    program = [sys.executable, "-c", _LATE, str(DEMO), str(SAMPLES / "owl.png")]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "the program ends\n"


def test_an_engine_is_not_for_a_fork_of_the_process(demo):
    demo.generate([SAMPLES / "owl.png"])
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            demo.generate([SAMPLES / "owl.png"])
        except WrongThread as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as stream:  # noqa: PTH123
        assert "opened before a fork" in stream.read()
    os.waitpid(child, 0)


def test_an_error_between_steps_is_told_and_the_thread_serves_on(caplog):
    engine, news = gated(), SimpleQueue()
    engine.runner.open.clear()
    real, engine.cancel = engine.cancel, Mock(side_effect=RuntimeError("a reason"))
    one, other = (engine.request(image(n), ignore_eos=True) for n in (1, 2))
    engine.stepper.submit(one, put := news.put)
    engine.stepper.submit(other, put)
    engine.stepper.cancel(other.id, put)
    behind: SimpleQueue = SimpleQueue()
    engine.stepper.submit(engine.request(image(4)), behind.put)
    engine.runner.open.set()
    assert str(news.get(timeout=20)) == "a reason"
    assert behind.get(timeout=20).finish_reason
    assert "an error between two steps" in caplog.text
    engine.cancel = real
    assert engine.generate([image(3)])
