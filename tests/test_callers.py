"""Threads that share an engine, and the forms in which they pass images."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InvalidImage, InvalidRequest, WrongThread
from runtime.planning.config import EngineConfig
from tests.conftest import SAMPLES
from tests.fakes import FakeRunner, fake_engine, image


def test_every_thread_gets_its_own_captions():
    engine = fake_engine(EngineConfig(slots=4, patience=0))
    alone = [fake_engine().generate([image(n % 10)], ["3"])[0].token_ids for n in range(120)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: engine.generate([image(n % 10)], ["3"])[0], range(120)))
    assert [caption.token_ids for caption in found] == alone
    assert engine.scheduler.idle


def test_what_threads_want_at_the_same_time_is_captioned_together():
    engine = fake_engine(EngineConfig(slots=8, patience=0))
    barrier = threading.Barrier(8)

    def ask(number):
        barrier.wait()
        return [engine.generate([image(number)], None, 8) for _ in range(20)]

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
    assert engine.generate([image(1)]) and engine.scheduler.idle


def test_one_who_asks_for_nonsense_disturbs_nobody():
    engine = fake_engine()
    with ThreadPoolExecutor(4) as pool:
        good = [pool.submit(engine.generate, [image(n)]) for n in range(20)]
        bad = [pool.submit(engine.generate, [image(1)], None, 999) for _ in range(5)]
        assert all(isinstance(future.exception(), InvalidRequest) for future in bad)
        assert all(future.result() for future in good)


def test_an_interrupted_thread_leaves_the_others_their_captions():
    class Interrupted(FakeRunner):
        def decode(self, tokens, fed, forced=()):
            if threading.current_thread().name == "interrupted":
                started.set()
                assert asked.wait(10)
                raise KeyboardInterrupt
            return super().decode(tokens, fed, forced)

    started, asked = threading.Event(), threading.Event()
    engine = fake_engine()
    engine.runner = Interrupted()

    def first():
        with pytest.raises(KeyboardInterrupt):
            engine.generate([image(1)])

    interrupted = threading.Thread(target=first, name="interrupted")
    interrupted.start()
    assert started.wait(10)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(engine.generate, [image(2)])
        asked.set()
        assert second.result(10)[0].token_ids == fake_engine().generate([image(2)])[0].token_ids
    interrupted.join(10)


def test_submit_and_step_are_for_one_thread():
    engine = fake_engine()
    engine.submit(image(1))
    with ThreadPoolExecutor(1) as pool:
        for call in (lambda: engine.submit(image(2)), engine.step,
                     lambda: engine.generate([image(2)])):  # fmt: skip
            assert isinstance(pool.submit(call).exception(), WrongThread)
        while not engine.scheduler.idle:
            engine.step()
        engine.abandon()
        assert pool.submit(engine.generate, [image(2)]).result()


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
    ("wrong", "message"),
    [
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
