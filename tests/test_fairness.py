"""Places, bytes, turns and caches: what one client must not take from others."""

import asyncio
import gc
import hashlib
import io
import socket
import threading

import pytest
from PIL import Image

from runtime.errors import InvalidRequest
from runtime.request import Completion, FinishReason, RequestOutput, SamplingParams, Timing
from server.bodies import json_parts
from server.http.handler import Handler
from server.images.turns import Turns
from server.service.admission import Admission, State
from server.service.cache import OutputCache
from tests.fakes import fake_engine, gated
from tests.live import as_json, b64, png, serve, until

JSON = {"Content_Type": "application/json"}
INFER = "/v2/models/fake/infer"


def taken(costs: dict[str, float], turns: int) -> dict[str, int]:
    """How often each client had a place, of clients that always want one."""

    async def run() -> dict[str, int]:
        places, had = Turns(1), dict.fromkeys(costs, 0)

        async def client(name: str, number: int) -> None:
            while True:
                await places.take(name)
                had[name] += 1
                await asyncio.sleep(0)
                places.give(name, costs[name])

        tasks = [asyncio.create_task(client(name, n)) for name in costs for n in range(4)]
        while sum(had.values()) < turns:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return had

    return asyncio.run(run())


def test_turns_are_of_equal_time_and_not_of_equal_number():
    had = taken({"dear": 0.13, "cheap": 0.005, "also cheap": 0.005}, 600)
    assert had["dear"] < 20
    assert had["cheap"] == pytest.approx(had["also cheap"], abs=3)


def test_turns_that_cost_the_same_are_of_equal_number():
    had = taken({"a": 1.0, "b": 1.0, "c": 1.0}, 300)
    assert max(had.values()) - min(had.values()) <= 2


def test_a_client_that_was_away_has_saved_nothing():
    async def run() -> list[str]:
        places, order = Turns(1), []
        await places.take("busy")

        async def client(name: str) -> None:
            await places.take(name)
            order.append(name)
            places.give(name, 1.0)

        for _ in range(100):
            places.give("busy", 1.0)
            await places.take("busy")
        names = ["busy", "away", "away", "away", "busy", "away", "busy"]
        tasks = [asyncio.create_task(client(name)) for name in names]
        await asyncio.sleep(0)
        places.give("busy", 1.0)
        await asyncio.gather(*tasks)
        return order

    order = asyncio.run(run())
    assert order[0] == "away"
    assert order.index("busy") <= 2


def test_beside_others_a_client_has_some_of_the_places_only():
    async def run() -> list[str]:
        clock = [100.0]
        places, order = Turns(4, beside=2, clock=lambda: clock[0]), []

        async def take(name: str) -> None:
            await places.take(name)
            order.append(name)

        tasks = [asyncio.create_task(take("lone")) for _ in range(3)]
        await asyncio.sleep(0)
        assert order == ["lone"] * 3, "nobody else is there"
        for _ in range(3):
            places.give("lone")
        tasks += [asyncio.create_task(take(name)) for name in ("other", "lone", "lone", "lone")]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        return order[3:]

    assert asyncio.run(run()) == ["other", "lone", "lone"]


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

    class Dear:
        client = "somebody"

    with admission.enter("somebody"):
        assert admission.accepted == 1
        with admission.aside(Dear()):
            assert (admission.inside, admission.accepted) == (0, 1)
        assert admission.accepted == 1
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
        # What is read is the same in both, so what is said is, too.
        assert clip.json["caption"] == image.json["caption"]


def test_who_leaves_a_stream_gives_the_place_of_the_key_back(tmp_path, request):
    digest = hashlib.sha256(b"secret").hexdigest()
    path = tmp_path / "keys"
    path.write_text(f"narrow {digest} 0 1\n")
    engine = gated(slots=1)
    gc.disable()  # it would give it back some time
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
    key = "fake", "x", (0,), SamplingParams(20)
    output = RequestOutput(1, Completion((1,)), FinishReason.STOP, Timing(1.0, 1.0, 1.0))

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
        ("/", {"inputs": {"question": "3"}}, "inputs has no image"),
    ],
)
def test_what_was_an_error_of_ours_is_named(path, body, message):
    with serve(fake_engine) as live:
        reply = live.request("POST", path, as_json(**body), **JSON)
        assert reply.status == 400
        assert message in reply.body.decode()


def test_many_errors_in_one_answer_are_refusals_that_are_waited_for(monkeypatch):
    waits: list[float] = []

    async def held_back(handler: Handler, wait: float) -> None:
        waits.append(wait)

    monkeypatch.setattr(Handler, "held_back", held_back)
    with serve(fake_engine) as live:
        for _ in range(3):
            assert live.caption(as_json(images=[b64(b"x")] * 64), **JSON).status == 200
    assert waits[0] == 0
    assert waits[-1] > 1
