"""Places, bytes, turns and caches: what one client must not take from others."""

import asyncio
import gc
import hashlib
import io
import socket
import threading
import time
import zlib

import pytest
from PIL import Image

from runtime.errors import InvalidImage, InvalidRequest
from runtime.request import Completion, FinishReason, RequestOutput, SamplingParams, Timing
from server.fairness.byte_budget import ByteBudget
from server.fairness.token_buckets import TokenBuckets
from server.http.handler import Handler
from server.images import heads
from server.refusals import QueueFull
from server.requests.json_body import json_parts
from server.service.admission import Admission, State
from server.service.cache import OutputCache
from server.service.client_rates import ClientRates
from tests.support.fakes import fake_engine, gated
from tests.support.live import JSON, as_json, b64, png, serve, until

INFER = "/v2/models/fake/infer"


def test_base64_of_other_characters_is_refused_before_it_is_read_through():
    with pytest.raises(InvalidRequest, match="not base64") as raised:
        json_parts(as_json(image="é" + "A" * 100_000))
    assert "other characters" in str(raised.value.__cause__)


def test_a_length_beyond_the_body_makes_no_room():
    with serve(fake_engine) as live:
        head = as_json(inputs=[{"name": "IMAGE", "shape": [1], "datatype": "BYTES", "data": []}])
        length = {"Inference_Header_Content_Length": "999999999"}
        reply = live.request("POST", INFER, head, **JSON, **length)
        assert reply.status == 400
        assert "the body has" in reply.json["error"]
        until(lambda: live.service.budget.held == 0)


def test_a_request_that_stepped_aside_is_waited_for():
    admission = Admission(queue=4, deadline=30)
    admission.state, admission.slots = State.READY, 2

    class Expensive:
        client = "somebody"

    async def run():
        with admission.enter("somebody"):
            assert admission.accepted == 1
            async with admission.aside(Expensive()):
                assert (admission.inside, admission.accepted) == (0, 1)
            assert admission.accepted == 1

    asyncio.run(run())
    assert admission.accepted == 0


def test_the_same_bytes_read_as_a_clip_are_another_image():
    """One has its transparency on white, and its caption is not the other's."""
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear, "PNG")
    data = clear.getvalue()
    with serve(fake_engine, cache_mb=1) as live:
        clip = live.caption(data, "?first_frame=true", Content_Type="video/x-png")
        image = live.caption(data)
        assert clip.status == image.status == 200
        assert live.metric("vignette_cache_hits_total") == 0
        # Both readings have the same pixels, so the same caption.
        assert clip.json["caption"] == image.json["caption"]


def test_who_leaves_a_stream_gives_the_place_of_the_key_back(tmp_path, request):
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"narrow {digest} 0 1\n")
    engine = gated(slots=1)
    gc.disable()  # a collection would release the place some time later
    request.addfinalizer(gc.enable)
    with serve(lambda: engine, slots=1, api_keys=path) as live:
        engine.runner.open.clear()
        client = socket.create_connection(("127.0.0.1", live.port))
        head = (
            "POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nX-API-Key: secret\r\n"
            f"Accept: text/event-stream\r\nContent-Length: {len(png())}\r\n\r\n"
        )
        client.sendall(head.encode() + png())
        until(lambda: engine.scheduler.running)
        threading.Timer(0.2, engine.runner.open.set).start()
        assert b"200" in client.recv(100)  # the answer has begun
        client.close()
        until(lambda: live.caption(png((1, 2, 3)), X_API_Key="secret").status == 200)


def test_a_flight_that_is_held_up_holds_others_up_once(monkeypatch):
    monkeypatch.setattr("server.service.cache._PATIENCE_SECONDS", 0.05)
    key = "fake", "fp32", "x", (0,), SamplingParams(20)
    output = RequestOutput(
        1, Completion((1,), finish_reason=FinishReason.STOP), Timing(1.0, 1.0, 1.0)
    )

    async def run() -> int:
        cache, made = OutputCache(10_000), []

        async def parked() -> RequestOutput:
            await asyncio.sleep(20)
            return output

        async def make() -> RequestOutput:
            made.append(1)
            return output

        first = asyncio.create_task(cache.get(key, parked))
        await asyncio.sleep(0)
        for _ in range(20):
            assert (await cache.get(key, make)).token_ids == (1,)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        size = cache.size
        await cache.get(key, make)
        assert cache.size == size, "it is kept once"
        return len(made)

    assert asyncio.run(run()) == 1


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/caption", {"image": [b64(png())], "prompt": [5]}, "prompt must be a string"),
        ("/caption", {"image": [b64(png())] * 2, "prompt": ["3", {}]}, "prompt must be a string"),
        ("/caption", {"images": [b64(png())] * 9, "logprobs": 20}, "160 at most"),
        ("/", {"inputs": {"question": "3"}}, "the body has 0 images"),
    ],
)
def test_what_was_an_error_of_ours_is_named(path, body, message):
    with serve(fake_engine) as live:
        reply = live.request("POST", path, as_json(**body), **JSON)
        assert reply.status == 400
        assert message in reply.body.decode()


def test_many_addresses_that_leave_do_not_have_as_many_bursts():
    one, many = ClientRates(), ClientRates()
    for _ in range(200):
        one.was_abandoned("a proxy that starts again")
    assert one.owed("a proxy that starts again") == 0
    for _ in range(60):
        for address in range(20):
            many.was_abandoned(f"10.0.0.{address}")
    assert all(many.owed(f"10.0.0.{address}") > 0 for address in range(20))


def test_many_errors_in_one_answer_are_refusals_that_are_waited_for(monkeypatch):
    waits: list[float] = []

    async def held_back(handler: Handler, wait: float) -> None:
        waits.append(wait)

    monkeypatch.setattr(Handler, "held_back", held_back)
    with serve(fake_engine) as live:
        live.service.rates.refusals = TokenBuckets(50.0, 100.0, clock=lambda: 0.0)
        for _ in range(3):
            assert live.caption(as_json(images=[b64(b"x")] * 64), **JSON).status == 200
    assert waits[0] == 0
    assert waits[-1] == (3 * 64 - 100) / 50


def test_a_list_of_errors_is_no_caption_that_makes_up_for_them():
    with serve(fake_engine) as live:
        live.service.rates.refusals = TokenBuckets(50.0, 4.0, clock=lambda: 0.0)
        for _ in range(5):
            assert live.caption(as_json(images=[b64(b"x")]), **JSON).status == 200
        assert live.service.rates.refusals.owed("127.0.0.1") == 1 / 50
        assert live.metric('vignette_requests_total{outcome="invalid_image"}') == 5


def test_a_long_head_in_a_few_pieces_is_read():
    with serve(fake_engine) as live, socket.create_connection(("127.0.0.1", live.port)) as client:
        client.sendall(b"POST /caption?prompt=%s HTTP/1.1\r\nHost: x" % (b"a" * 15_000))
        for part in (b"\r", b"\n", b"\r", b"\n"):  # the head's end spans two reads
            client.sendall(part)
            time.sleep(0.01)
        assert client.recv(100).startswith(b"HTTP/1.1 400")  # the body is empty


def test_images_that_fail_count_by_what_they_took(monkeypatch):
    monkeypatch.setattr("server.images.pool._QUICK", -1.0)  # each a second too long
    with serve(fake_engine) as live:
        client = "127.0.0.1"
        for _ in range(3):
            assert live.caption(b"no image").error == "invalid_image"
        assert live.service.decoders._misjudged.owed(client)


def test_a_png_of_many_parts_that_unpack_is_refused_unopened():
    def part(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + check.to_bytes(4, "big")

    image = png()
    packed = part(b"zTXt", b"k\0\0" + zlib.compress(bytes(1000)))
    heads.check(image[:33] + 15 * packed + image[33:])
    with pytest.raises(InvalidImage, match="save it again"):
        heads.check(image[:33] + 17 * packed + image[33:])
    flags = b"\1\0", b"\0\0"  # whether it is compressed, and how
    with pytest.raises(InvalidImage, match="save it again"):
        heads.check(image[:33] + 17 * part(b"iTXt", b"k\0" + flags[0] + b"\0\0x") + image[33:])
    heads.check(image[:33] + 17 * part(b"iTXt", b"k\0" + flags[1] + b"\0\0x") + image[33:])


def test_two_clients_leave_room_for_the_bytes_of_a_third():
    budget = ByteBudget(1000)
    for client, most in (("a", 500), ("b", 250), ("c", 125)):
        budget.hold(most, client)
        with pytest.raises(QueueFull):
            budget.hold(1, client)
