"""Decoder processes: a crash, a hang or a bomb costs the one image and nothing else."""

import asyncio
import base64
import errno
import io
import os
import signal
import struct
import threading
import time
from contextlib import suppress

import pytest
from PIL import Image

from bench.common.processes import pss
from bench.reliability.crafted import unpacking
from runtime.errors import InvalidImage, InvalidRequest, TooManyPixels
from runtime.model.preprocess import preprocess
from server.images import lane
from server.images.cost import TooHard
from server.images.lane import NoDecoder
from tests.support.decoders import HOW, decode, job, new_store, pool
from tests.support.live import png, until


@pytest.fixture
def store(tmp_path):
    return new_store(tmp_path)


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


def kill_in_its_work(decoders, number, after=0.3):
    [pid] = decoders.pids
    os.kill(pid, signal.SIGSTOP)

    def end():
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)

    threading.Timer(after, end).start()


def test_a_decoder_that_does_not_start_is_no_image_s_fault(store, tmp_path):
    store.path.rename(tmp_path / "elsewhere")
    decoders = pool(store)
    with pytest.raises(NoDecoder, match="no process that decodes images starts here"):
        decode(decoders, png())
    (tmp_path / "elsewhere").rename(store.path)
    with suppress(NoDecoder):  # the next process may have looked before
        decode(decoders, png())
    decode(decoders, png())
    decoders.close()


def test_a_host_without_room_for_another_process_is_no_image_s_fault(store, monkeypatch):
    decoders = pool(store)
    decode(decoders, png())
    os.kill(decoders.pids[0], signal.SIGKILL)

    def full(setup):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patched:
        patched.setattr(lane, "Decoder", full)
        for _ in range(2):
            with pytest.raises(NoDecoder, match="temporarily unavailable"):
                decode(decoders, png())
    decode(decoders, png())
    decoders.close()


def test_an_image_that_crashes_its_decoder_is_refused_from_then_on(store):
    decoders = pool(store)
    decode(decoders, png())
    kill_in_its_work(decoders, signal.SIGSEGV)
    with pytest.raises(TooHard, match="crashed"):
        decode(decoders, png())
    before = decoders.pids
    with pytest.raises(TooHard, match="crashed"):
        decode(decoders, png())
    assert decoders.pids == before, "it was not decoded again"
    decode(decoders, png((1, 2, 3)))
    decoders.close()


def test_a_decoder_that_somebody_kills_costs_nobody_anything(store):
    decoders = pool(store)
    decode(decoders, png())
    kill_in_its_work(decoders, signal.SIGKILL)
    decode(decoders, png((7, 7, 7)), 2)
    assert store[2][0, 0, 0] == 7
    decoders.close()


def test_a_jpeg_with_hundreds_of_scans_is_refused_by_its_head(store):
    decoders = pool(store)
    with pytest.raises(InvalidImage, match="120 scans"):
        decode(decoders, scans(120))
    decode(decoders, scans(9))
    decoders.close()


def scans(count):
    """A progressive JPEG of `count` scans, the last of them repeated."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    more = count - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * max(0, more) + data[-2:]


def test_a_telephones_picture_with_another_in_it_is_a_usual_one(store):
    buffer = io.BytesIO()
    picture = Image.new("RGB", (400, 300), (9, 8, 7))
    picture.save(buffer, "MPO", save_all=True, append_images=[picture.resize((100, 75))])
    decoders = pool(store)
    decode(decoders, buffer.getvalue(), 1)
    assert store[1][0, 0, 0] == 9
    decoders.close()


def test_what_a_library_says_of_an_image_reaches_no_log(store, capfd):
    decoders = pool(store)
    tags = b"".join(struct.pack("<HHII", 60_000, 2, 9, 8) for _ in range(3000))
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 3000) + tags + bytes(4)
    with pytest.raises(InvalidImage):
        decode(decoders, tiff)
    decoders.close()
    assert len(capfd.readouterr().err) < 2000


def test_a_json_body_is_taken_apart_by_a_decoder(store):
    decoders = pool(store)
    body = b'{"image": "%s", "prompt": "3"}' % base64.b64encode(b"x" * 100_000)
    parts = asyncio.run(decoders.parts(body, "somebody"))
    assert (parts.images, parts.fields) == ([b"x" * 100_000], {"prompt": "3", "image": 1})
    with pytest.raises(InvalidRequest, match="not JSON"):
        asyncio.run(decoders.parts(b"{", "somebody"))
    decoders.close()


def test_images_are_decoded_in_their_order(store):
    decoders = pool(store)
    decode(decoders, png())
    order = []

    async def one(number):
        await decoders.decode(job(png()))
        order.append(number)

    async def run():
        first = [asyncio.create_task(one(n)) for n in range(4)]
        while not order:
            await asyncio.sleep(0)
        await asyncio.gather(*first, one(4))

    asyncio.run(run())
    assert order == [0, 1, 2, 3, 4]
    decoders.close()


def test_a_decoder_that_is_stopped_is_replaced_and_its_image_decoded(store):
    decoders = pool(store)
    decode(decoders, png())
    decoders._wall = 1.0
    [stopped] = decoders.pids
    os.kill(stopped, signal.SIGSTOP)
    decode(decoders, png())
    assert stopped not in decoders.pids
    decoders.close()


def test_a_request_that_gives_up_does_not_free_a_slot_that_is_written_to():
    """Neither its deadline nor its client's going: the decoder is slower than both."""
    from tests.support.fakes import fake_engine
    from tests.support.live import serve

    with serve(fake_engine) as live:
        places = len(live.model.store._free)
        assert live.caption(png()).status == 200
        [decoder] = live.service.decoders.pids
        os.kill(decoder, signal.SIGSTOP)
        reply = live.caption(png(), "?timeout_ms=150")
        assert reply.error == "deadline_exceeded"
        assert len(live.model.store._free) == places - 1
        assert live.caption(png(), "?timeout_ms=150").error == "deadline_exceeded"
        until(lambda: len(live.model.store._free) == places - 1)  # the second had not begun
        os.kill(decoder, signal.SIGCONT)
        until(lambda: len(live.model.store._free) == places)


def test_memory_is_limited(tmp_path, store):
    """An image within the limit of pixels that needs more memory than the process may take."""
    decoders = pool(store, 60.0, 700, pixels=400_000_000)
    Image.new("RGB", (8, 8)).save(file := io.BytesIO(), "BMP")
    head = file.getvalue()
    with pytest.raises(TooHard, match="would take 6885 MiB, and there are 700"):
        decode(decoders, b"".join([head[:18], struct.pack("<ii", 19_000, 19_000), head[26:]]))
    decode(decoders, png())
    decoders.close()


def test_a_large_image_leaves_no_memory_behind(store):
    """Its 400 MB would stay with the process until another such image came."""
    decoders = pool(store, pixels=50_000_000)
    decode(decoders, unpacking(7_000))
    until(lambda: max(map(pss, decoders.pids)) < 100 * 2**20)
    decoders.close()
