"""The one thread of an engine: from its opening to the end of the program, and after a fork."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from unittest.mock import Mock

from runtime.engine import Engine
from runtime.errors import WrongThread
from runtime.execution.host import HostRunner
from runtime.planning.config import EngineConfig
from tests.support.fakes import fake_engine, gated, image
from tests.support.live import until
from tests.support.paths import DEMO, ROOT, SAMPLES


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
import atexit, sys, threading, time
from runtime.engine import Engine

def ask():
    while True:
        engine.generate([image] * 8)

atexit.register(time.sleep, 0.3)  # after what the engine registers, before it is ended
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
        done = subprocess.run(
            program, cwd=ROOT, capture_output=True, text=True, timeout=25, check=False
        )
        assert done.returncode == 3, done.stderr


_OUTLIVES = """
import sys, threading
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

def ask():
    ready.wait()
    for _ in range(3):
        print(len(engine.generate([sys.argv[2]] * 8)))

ready = threading.Event()
engine = Engine.open(sys.argv[1], EngineConfig(provider="cpu", threads=4, encode_batch=8))
threading.Thread(target=ask).start()
threading._register_atexit(ready.set)
"""


def test_threads_that_outlive_the_main_one_are_served():
    command = [sys.executable, "-c", _OUTLIVES, DEMO, SAMPLES / "owl.png"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["8"] * 3), done.stderr


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
