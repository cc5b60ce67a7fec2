"""What strangers send over gRPC takes nothing from others."""

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections import Counter
from types import SimpleNamespace

import grpc
import pytest
import tritonclient.grpc as triton
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.contestants.servers import free_port
from runtime.errors import InvalidRequest
from server.grpc import bounds
from server.grpc.bounds import Bounds
from server.grpc.stubs import grpc_service_pb2 as pb
from server.grpc.wire import call_in
from server.settings import Settings
from tests.server.grpc.test_grpc import IMAGES, SERVICE, tensor
from tests.support.live import fetch, until
from tests.support.processes import MODEL, ON_CPU, SAID, running


def call(**fields) -> bytes:
    return pb.ModelInferRequest(model_name="m", **fields).SerializeToString()


BOMBS = {
    "inputs": b"\x2a\x00" * 100_000,
    "outputs": b"\x32\x00" * 100_000,
    "images": b"\x3a\x00" * 100_000,
    "elements": call(inputs=[{"contents": {"bytes_contents": [b""] * 5000}}]),
    "numbers": call(inputs=[{"contents": {"int_contents": range(100_000)}}]),
    "parameters": call(parameters={str(n): {} for n in range(2000)}),
    "unknown": b"\xfa\x07\x00" * 100_000,
    "a large name": call() + b"\x0a\xff\xff\x07" + b"x" * 131_071,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_message_that_unpacks_to_much_is_not_unpacked(bomb):
    with pytest.raises(InvalidRequest, match="1024 fields and 64 KiB"):
        call_in(bomb)


@given(st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_a_call_or_told_to_be_none(data):
    try:
        assert isinstance(call_in(data), Message)
    except InvalidRequest:
        return


def test_an_id_that_comes_back_with_each_token_is_short():
    assert call_in(call(id="x" * 256)).id == "x" * 256
    with pytest.raises(InvalidRequest, match="id must have 256 characters"):
        call_in(call(id="x" * 257))


def test_images_may_be_as_large_as_bodies():
    image = bytes(9_000_000)
    raw = call(inputs=[{"name": "IMAGE", "datatype": "BYTES"}], raw_input_contents=[image])
    assert call_in(raw).raw_input_contents[0] == image
    inside = call(inputs=[{"name": "IMAGE", "contents": {"bytes_contents": [image]}}])
    assert call_in(inside).inputs[0].contents.bytes_contents[0] == image


@pytest.fixture(scope="module")
def ports():
    port = free_port()
    with running(*ON_CPU, "--grpc-port", str(port), "--body-seconds", "3") as (_, http, _):
        yield port, http


def stream_call(channel: grpc.Channel):
    return channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer",
        pb.ModelInferRequest.SerializeToString,
        pb.ModelStreamInferResponse.FromString,
    )


def captioned(port: int) -> str:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        return client.infer(MODEL, [tensor("IMAGE", IMAGES[:1])]).as_numpy("CAPTION")[0].decode()


def test_calls_that_are_held_open_leave_places_for_others_and_http_alone(ports):
    ended = threading.Event()

    def silent():
        ended.wait(30)
        yield from ()

    channels = [grpc.insecure_channel(f"127.0.0.1:{ports[0]}", [("x", n)]) for n in range(4)]
    held = [stream_call(channels[n % 4])(silent()) for n in range(400)]
    until_refused = time.monotonic() + 20
    while not any(each.done() for each in held) and time.monotonic() < until_refused:
        time.sleep(0.01)
    refused = [each for each in held if each.done()]
    assert refused, "an address has so many calls at once"
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    image = fetch(ports[1], "POST", "/caption", IMAGES[0])
    assert image.json["caption"] == SAID["owl.png"]["caption"]
    ended.set()
    for channel in channels:
        channel.close()
    assert captioned(ports[0]) == SAID["owl.png"]["caption"]


def test_calls_whose_message_never_comes_are_counted_and_ended(ports):
    ended = threading.Event()

    def silent():
        ended.wait(30)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        begin = channel.stream_unary(f"/{SERVICE}/ServerLive")  # on the wire like a unary call
        held = [begin.future(silent()) for _ in range(100)]
        beside = grpc.insecure_channel(f"127.0.0.1:{ports[0]}", [("x", 1)])
        held += [beside.stream_unary(f"/{SERVICE}/ModelInfer").future(silent()) for _ in range(100)]
        codes = Counter(each.code() for each in held)
        assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED: 200}
        ended.set()
        beside.close()


def test_idle_streams_make_room_for_calls_of_others(monkeypatch):
    monkeypatch.setattr(bounds, "_CROWDED", 6)
    monkeypatch.setattr(bounds, "_FEW", 2)
    told = []

    class Context:
        def __init__(self, address):
            self.peer = lambda: f"ipv4:{address}:5"

        def invocation_metadata(self):
            return ()

        async def read(self):
            await asyncio.sleep(60)

        async def abort(self, status, reason):
            told.append((self.peer(), status))
            raise grpc.aio.AbortError

    async def infer(requests, context):
        async for _ in requests:
            pass

    async def run():
        service = SimpleNamespace(settings=Settings(_env_file=None))
        handler = grpc.stream_stream_rpc_method_handler(infer)
        call = Bounds(service, frozenset())._bounded(handler, captions=True)
        addresses = ["10.0.0.1", *["10.0.0.2"] * 5, *["10.0.0.3", "10.0.0.4"] * 3]
        tasks = []
        for address in addresses:
            tasks.append(asyncio.create_task(call(None, Context(address))))
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        ended = [at for at, task in enumerate(tasks) if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return ended

    assert asyncio.run(run())[:3] == [1, 2, 3], "the oldest of the address with the most of them"
    assert {status for _, status in told} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert "ipv4:10.0.0.1:5" not in {peer for peer, _ in told}, "who has few calls keeps them"


def unread(port: int):
    """A connection whose client takes no answers: no stream of it may send data."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b"\0\4\0\0\0\0"))
    return client


def frame(kind: int, flags: int, payload: bytes, stream: int = 0) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def begun(method: str, stream: int, message: bytes = b"") -> bytes:
    """Frames of a call, its headers written as literals without an index (RFC 7541, 6.2.2)."""
    fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "x",
              "content-type": "application/grpc", "te": "trailers"}  # fmt: skip
    block = b"".join(
        b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field)
        for field in fields.items()
    )
    data = b"\0" + len(message).to_bytes(4, "big") + message
    return frame(1, 4, block, stream) + frame(0, 1, data, stream)


def test_a_watch_that_nobody_reads_keeps_no_change_from_others(ports):
    with unread(ports[0]) as client:
        client.sendall(begun("/grpc.health.v1.Health/Watch", 1))
        with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(iter(watch)).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            os.kill(fetch(ports[1], "GET", "/health/ready").json["workers"][0]["pid"], 9)
            until(lambda: fetch(ports[1], "GET", "/health/ready").status == 503)
            until(lambda: fetch(ports[1], "GET", "/health/ready").status == 200)
            check = health_pb2_grpc.HealthStub(channel).Check
            serving = health_pb2.HealthCheckResponse.SERVING
            until(lambda: check(health_pb2.HealthCheckRequest()).status == serving)
            assert captioned(ports[0]) == SAID["owl.png"]["caption"]


def test_answers_that_nobody_takes_are_given_up(ports):
    with contextlib.ExitStack() as held:
        for _ in range(3):
            client = held.enter_context(unread(ports[0]))
            for stream in range(1, 240, 2):
                client.sendall(begun(f"/{SERVICE}/ServerLive", stream))
        with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
            live = channel.unary_unary(f"/{SERVICE}/ServerLive")

            def answered():
                try:
                    return live(b"", timeout=2) is not None
                except grpc.RpcError as error:
                    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                    return False

            until(lambda: not answered(), 10)
            until(answered, 20)


def test_what_is_no_message_is_told_so(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        for method, messages in (("ServerLive", []), ("ModelReady", [b"\xff" * 50])):
            with pytest.raises(grpc.RpcError) as error:
                channel.stream_unary(f"/{SERVICE}/{method}")(iter(messages))
            assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_streams_that_nobody_reads_hold_no_place(ports):
    """Their answers wait for them; the queue is free as soon as they are generated."""
    window = [("grpc.http2.lookahead_bytes", 0), ("grpc.http2.bdp_probe", 0)]
    request = pb.ModelInferRequest(
        model_name=MODEL, inputs=[{"name": "IMAGE", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[len(IMAGES[0]).to_bytes(4, "little") + IMAGES[0]],
    )  # fmt: skip
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}", window) as channel:
        streams = [stream_call(channel)(iter([request] * 3)) for _ in range(40)]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            text = fetch(ports[1], "GET", "/metrics").body.decode()
            if f'vignette_requests_inside{{model="{MODEL}"}} 0.0' in text:
                break
            time.sleep(0.1)
        else:
            pytest.fail("they hold their places")
        for stream in streams:
            stream.cancel()


def test_what_is_no_caption_is_asked_for_so_often(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        codes, end = set(), time.monotonic() + 60
        while grpc.StatusCode.RESOURCE_EXHAUSTED not in codes and time.monotonic() < end:
            answers = [check.future(health_pb2.HealthCheckRequest()) for _ in range(1000)]
            codes |= {answer.code() for answer in answers}
    assert {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED} <= codes


def test_reflection_takes_short_questions_alone(ports):
    def ask(symbol):
        question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
        [answer] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([question])
        )
        return answer

    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        assert ask(SERVICE).HasField("file_descriptor_response")
        with pytest.raises(grpc.RpcError) as error:
            ask("x" * 100_000)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_method_that_is_not_there_is_told_without_a_traceback(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(f"/{SERVICE}/TraceSetting")(b"")
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
