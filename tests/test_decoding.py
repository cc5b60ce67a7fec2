"""Decoder processes: a crash, a hang or a bomb costs the one image and nothing else."""

import asyncio
import os
import signal
import threading
import time

import numpy as np
import pytest

from runtime.errors import InvalidImage, TooManyPixels
from runtime.manifest import Preprocessing
from runtime.preprocess import preprocess
from server.decoding import Decoders, TooHard
from server.wire import NoSharedMemory, PixelStore
from tests.live import png

HOW = Preprocessing(32, 32, 3)


@pytest.fixture
def store(tmp_path):
    return PixelStore(tmp_path / "pixels", 4, (3, 32, 32), create=True)


def pool(store, seconds=20.0, memory=2048, count=1):
    arguments = (store.path, store.slots, store.shape)
    return Decoders(count, arguments, HOW, 1_000_000, seconds, memory * 2**20)


def decode(decoders, image, slot=0):
    asyncio.run(decoders.decode(image, slot, None))


def test_pixels_land_in_the_slot_as_preprocess_makes_them(store):
    decoders = pool(store)
    image = png((9, 8, 7), (50, 40))
    decode(decoders, image, 2)
    assert (store[2] == preprocess(image, HOW)).all()
    assert not store[1].any()
    decoders.close()


def test_what_is_wrong_with_an_image_is_told(store):
    decoders = pool(store)
    with pytest.raises(InvalidImage, match="not an image"):
        decode(decoders, b"hello")
    with pytest.raises(TooManyPixels):
        decode(decoders, png(size=(1100, 1100)))
    decode(decoders, png())
    decoders.close()


def test_a_decoder_that_died_idle_is_replaced_and_nobody_blamed(store):
    decoders = pool(store)
    decode(decoders, png())
    [before] = decoders.pids
    os.kill(before, signal.SIGSEGV)
    time.sleep(0.2)
    decode(decoders, png((1, 2, 3)), 3)
    assert decoders.pids != [before]
    assert store[3][0, 0, 0] == 1
    decoders.close()


def test_an_image_that_kills_its_decoder_is_named_and_the_next_is_decoded(store):
    decoders = pool(store)
    decode(decoders, png())
    [before] = decoders.pids
    os.kill(before, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (before, signal.SIGKILL)).start()
    with pytest.raises(TooHard, match="crashed"):
        decode(decoders, png())
    decode(decoders, png())
    decoders.close()


def test_images_are_decoded_in_their_order(store):
    decoders = pool(store)
    decode(decoders, png())
    order = []

    async def one(number):
        await decoders.decode(png(), 0, None)
        order.append(number)

    async def run():
        first = [asyncio.create_task(one(n)) for n in range(4)]
        while not order:
            await asyncio.sleep(0)
        await asyncio.gather(*first, one(4))

    asyncio.run(run())
    assert order == [0, 1, 2, 3, 4]
    decoders.close()


def test_a_decoder_that_hangs_is_replaced_in_time(store):
    decoders = pool(store)
    decode(decoders, png())
    decoders._seconds = 0.5
    os.kill(decoders.pids[0], signal.SIGSTOP)
    start = time.perf_counter()
    with pytest.raises(TooHard, match=r"0\.5 s"):
        decode(decoders, png())
    assert time.perf_counter() - start < 5
    decoders._seconds = 20.0
    decode(decoders, png())
    decoders.close()


def test_a_request_that_gives_up_does_not_free_a_slot_that_is_written_to():
    """Neither its deadline nor its client's going: the decoder is slower than both."""
    from tests.fakes import fake_engine
    from tests.live import serve, until

    with serve(fake_engine) as live:
        places = len(live.service.store._free)
        assert live.caption(png()).status == 200
        [decoder] = live.service.decoders.pids
        os.kill(decoder, signal.SIGSTOP)
        reply = live.caption(png(), "?timeout_ms=150")
        assert reply.error == "deadline_exceeded"
        assert len(live.service.store._free) == places - 1
        assert live.caption(png(), "?timeout_ms=150").error == "deadline_exceeded"
        until(lambda: len(live.service.store._free) == places - 1)  # that one had not begun
        os.kill(decoder, signal.SIGCONT)
        until(lambda: len(live.service.store._free) == places)


def test_memory_is_limited(tmp_path, store):
    """An image within the limit of pixels that needs more memory than the process may take."""
    arguments = (store.path, store.slots, store.shape)
    decoders = Decoders(1, arguments, HOW, 400_000_000, 60.0, 700 * 2**20)
    with pytest.raises((InvalidImage, TooHard)):
        decode(decoders, png(size=(19_000, 19_000)))
    decode(decoders, png())
    decoders.close()


def test_a_store_that_does_not_fit_says_what_to_do(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSharedMemory, match="--shm-size"):
        PixelStore(tmp_path / "x", 4, (3, 8, 8), create=True)


def test_both_ends_of_a_store_see_the_same_bytes(tmp_path):
    mine = PixelStore(tmp_path / "x", 2, (3, 8, 8), create=True)
    theirs = PixelStore(tmp_path / "x", 2, (3, 8, 8))
    slot = mine.take()
    mine[slot][:] = 7
    assert (theirs[slot] == 7).all()
    mine.give_back(slot)
    assert sorted([mine.take(), mine.take()]) == [0, 1]
    assert np.asarray(theirs[1]).dtype == np.uint8
