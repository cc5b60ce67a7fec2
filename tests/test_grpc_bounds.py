"""What strangers send over gRPC takes nothing from others."""

import asyncio
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
from tests.live import fetch
from tests.test_end_to_end import MODEL, ON_CPU, SAID, running
from tests.test_grpc import IMAGES, SERVICE, tensor


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

    class Context:
        def __init__(self, address):
            self.peer = lambda: f"ipv4:{address}:5"

        def invocation_metadata(self):
            return ()

        async def read(self):
            await asyncio.sleep(60)

    async def infer(requests, context):
        async for _ in requests:
            pass

    async def run():
        service = SimpleNamespace(settings=Settings(_env_file=None))
        handler = grpc.stream_stream_rpc_method_handler(infer)
        call = Bounds(service, frozenset())._bounded(handler, captions=True)
        addresses = ["10.0.0.1", *["10.0.0.2"] * 5, "10.0.0.3", "10.0.0.4"]
        tasks = []
        for address in addresses:
            tasks.append(asyncio.create_task(call(None, Context(address))))
            await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        ended = [at for at, task in enumerate(tasks) if task.cancelled()]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return ended

    assert asyncio.run(run()) == [1, 2], "the oldest of the address with the most of them"


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
