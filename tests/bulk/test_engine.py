"""The engine of a bulk run: a process of its own, which may end."""

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from runtime.errors import ComputationFailed, InvalidRequest, ProviderError
from server.bulk.captioners import local
from server.bulk.captioners.captioning import RunFailed
from server.bulk.captioners.engine import BulkEngine, EngineSetup
from server.bulk.captioners.local import LocalCaptioner
from server.bulk.captioners.loop_thread import LoopThread
from server.processes.supervisor import CannotStart
from tests.support.fakes import MANIFEST, FakeRunner, fake_engine, fake_folder, fake_worker
from tests.support.live import png, until
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path) -> Path:
    return fake_folder(tmp_path / "engine")


def setup(folder: Path, open_engine) -> EngineSetup:
    return EngineSetup(folder, main=partial(fake_worker, open_engine))


def test_an_engine_that_dies_while_it_is_opened_is_told(folder):
    with pytest.raises(CannotStart, match="no worker process stays up"):
        BulkEngine(setup(folder, partial(os._exit, 3)), None, {})


def no_card():
    raise ProviderError("there is no card")


def test_why_an_engine_can_not_be_opened_is_told(folder):
    with pytest.raises(CannotStart, match="there is no card"):
        BulkEngine(setup(folder, no_card), None, {})


def test_a_model_of_several_frames_is_refused_at_once(tmp_path):
    manifest = replace(MANIFEST, sizes=replace(MANIFEST.sizes, frames=6))
    with pytest.raises(InvalidRequest, match="several frames"):
        BulkEngine(setup(fake_folder(tmp_path / "video", manifest), fake_engine), None, {})


def test_sampling_that_takes_more_slots_than_there_are_is_refused_at_once(folder):
    with pytest.raises(InvalidRequest, match="n is 4, and there are 3 slots"):
        BulkEngine(setup(folder, fake_engine), None, {"n": 4, "temperature": 1.0})


def test_an_interrupt_while_the_engine_opens_leaves_no_process(folder):
    before = set(multiprocessing.active_children())

    def interrupt() -> None:
        until(lambda: set(multiprocessing.active_children()) - before)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        BulkEngine(setup(folder, partial(time.sleep, 100)), None, {})
    thread.join()
    assert set(multiprocessing.active_children()) <= before


def test_an_interrupt_while_decoders_start_ends_the_engine(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(local, "BulkDecoders", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LocalCaptioner(setup(folder, fake_engine), None, {}, 10**6)
    assert set(multiprocessing.active_children()) <= before


def test_who_waits_for_a_loop_that_is_closed_is_told():
    loop = LoopThread("test")
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(loop.run, asyncio.sleep(100)) for _ in range(4)]
        until(lambda: sum(each.running() for each in asked) == 4)
        loop.close()
        for each in asked:
            assert isinstance(each.exception(5), (CancelledError, RuntimeError))


def test_a_program_that_does_not_close_it_ends_all_the_same(folder):
    program = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from server.bulk.captioners.engine import BulkEngine, EngineSetup\n"
        "from tests.support.fakes import fake_engine, fake_worker\n"
        "if __name__ == '__main__':\n"
        "    setup = EngineSetup(Path(sys.argv[1]), main=partial(fake_worker, fake_engine))\n"
        "    engine = BulkEngine(setup, None, {})\n"
        "    print(engine.facts.slots)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert ended.stdout == "3\n"


class _BreaksDown(FakeRunner):
    def decode(self, *args, **kwargs):
        found = super().decode(*args, **kwargs)
        found.logprobs[:] = np.nan
        return found


def _breaking_down():
    engine = fake_engine()
    engine.runner = _BreaksDown()
    return engine


def test_an_image_whose_numbers_break_down_is_an_error_and_no_caption(folder):
    with (
        closing(BulkEngine(setup(folder, _breaking_down), None, {})) as engine,
        pytest.raises(ComputationFailed, match="NaN"),
    ):
        engine.caption(np.zeros(MANIFEST.sizes.pixels, np.uint8), None)


class _Dying(FakeRunner):
    def encode(self, *_) -> None:
        os._exit(1)


class _DiesAndStaysDead:
    """Opens an engine whose process dies of its first image; cannot be opened again."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __call__(self):
        if self._marker.exists():
            raise ProviderError("the card has fallen off the bus")
        self._marker.touch()
        engine = fake_engine()
        engine.runner = _Dying()
        return engine


class _DiesAndChanges:
    """Opens an engine whose process dies of its first image; the next one has another precision."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __call__(self):
        engine = fake_engine()
        if self._marker.exists():
            engine.runner.plan = replace(engine.runner.plan, combination="another")
        else:
            self._marker.touch()
            engine.runner = _Dying()
        return engine


def test_a_worker_of_another_precision_than_before_ends_the_run(folder, tmp_path, monkeypatch):
    """The captions of both would stand beside each other, all under the precision of the first."""
    monkeypatch.setattr("server.processes.supervisor._FIRST_PAUSE", 0.05)
    opening = _DiesAndChanges(tmp_path / "died")
    with closing(LocalCaptioner(setup(folder, opening), None, {}, 10**6)) as captioner:
        with pytest.raises(RunFailed, match=r"would run .* another now, not .* fake"):
            captioner.caption(png(), None)
        with pytest.raises(RunFailed, match="another"):
            captioner.caption(png((1, 2, 3)), None)


def test_an_engine_that_can_not_be_opened_again_ends_the_run_and_fails_no_image(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("server.processes.supervisor._FIRST_PAUSE", 0.05)
    opening = _DiesAndStaysDead(tmp_path / "died")
    with (
        closing(LocalCaptioner(setup(folder, opening), None, {}, 10**6)) as captioner,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(captioner.caption, png(), None) for _ in range(4)]
        for each in asked:
            with pytest.raises(RunFailed, match="does not start any more"):
                each.result(60)
