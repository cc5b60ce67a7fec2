"""The engine of a bulk run: a process of its own, which may end."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from runtime.errors import ProviderError
from server.bulk import local
from server.bulk.captioning import RunFailed
from server.bulk.engine_process import EngineProcess, NoEngine
from server.bulk.local import LocalCaptioner
from tests.fakes import fake_engine, video_engine
from tests.live import png, until


def test_an_engine_that_dies_while_it_is_opened_is_told():
    with pytest.raises(NoEngine, match="ended while it was opened"):
        LocalCaptioner(partial(os._exit, 3), None, {}, 10**6)


def test_a_model_of_several_frames_is_refused_at_once():
    with pytest.raises(NoEngine, match="several frames"):
        LocalCaptioner(video_engine, None, {}, 10**6)


def test_an_engine_whose_process_can_not_be_started_says_so():
    with pytest.raises(NoEngine, match="can't be started"):
        LocalCaptioner(lambda *_: fake_engine(), None, {}, 10**6)


def test_an_interrupt_while_the_engine_opens_leaves_no_process():
    before = set(multiprocessing.active_children())

    def interrupt() -> None:
        until(lambda: set(multiprocessing.active_children()) - before)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        EngineProcess(partial(time.sleep, 100), None, {})
    thread.join()
    assert set(multiprocessing.active_children()) <= before


def test_an_interrupt_while_decoders_start_ends_the_engine(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(local, "BulkDecoders", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LocalCaptioner(fake_engine, None, {}, 10**6)
    assert set(multiprocessing.active_children()) <= before


class _DiesAndStaysDead:
    """Opens an engine whose process dies of its first image; cannot be opened again."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __call__(self):
        if self._marker.exists():
            raise ProviderError("the card has fallen off the bus")
        self._marker.touch()
        engine = fake_engine()
        engine.generate = lambda *_, **__: os._exit(1)
        return engine


def test_an_engine_that_can_not_be_opened_again_ends_the_run_and_fails_no_image(tmp_path):
    captioner = LocalCaptioner(_DiesAndStaysDead(tmp_path / "died"), None, {}, 10**6)
    with closing(captioner), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(captioner.caption, png(), None) for _ in range(4)]
        for each in asked:
            with pytest.raises(RunFailed, match="fallen off the bus"):
                each.result(60)
