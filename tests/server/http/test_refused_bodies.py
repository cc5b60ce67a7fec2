"""What a refused request leaves behind: nothing that has to wait for Python's garbage collector."""

import asyncio
import gc
import socket
import time
import types
from contextlib import contextmanager

import grpc
import pytest

from bench.contestants.servers import free_port
from server.grpc.listening import start
from server.grpc.stubs import grpc_service_pb2 as pb
from tests.support.fakes import fake_engine
from tests.support.live import as_json, b64, multipart, png, serve, until

BAD = b"\0" * 50_000
LARGE = 10_000  # bytes of a request's content


@contextmanager
def nothing_left():
    """Assert that no frame in a reference cycle holds anything large."""
    gc.disable()
    gc.freeze()  # what was there before is not looked at
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        frames = [each for each in gc.garbage if isinstance(each, types.FrameType)]
        held = {
            f"{frame.f_code.co_qualname} {name}"
            for frame in frames
            for name, value in frame.f_locals.items()
            if isinstance(value, bytes | bytearray) and len(value) > LARGE
        }
        assert not held
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@pytest.fixture(scope="module")
def live():
    with serve(fake_engine) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/caption", BAD, "image/png"),
        ("/caption?stream=true", BAD, "image/png"),
        ("/caption", *multipart(image=BAD)),
        ("/caption", as_json(image=b64(BAD)), "application/json"),
        ("/caption", as_json(images=[b64(BAD)] * 3), "application/json"),
        ("/", as_json(inputs=b64(BAD)), "application/json"),
        ("/caption", b"{" * 100_000, "application/json"),
        ("/v2/models/fake/infer", as_json(inputs=[
            {"name": "IMAGE", "datatype": "BYTES", "shape": [2], "data": [b64(BAD), b64(BAD)]}
        ]), "application/json"),
        ("/v1/chat/completions", as_json(messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(BAD)}"}}
        ]}]), "application/json"),
    ],
)  # fmt: skip
def test_a_refused_body_is_let_go_of(live, path, body, kind):
    live.request("POST", path, body, Content_Type=kind)
    with nothing_left():
        for _ in range(3):
            reply = live.request("POST", path, body, Content_Type=kind)
            assert reply.status == 400 or all("error" in each for each in reply.json["results"])


HEAD = (
    b"POST /caption%s HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
)
CHUNKED = b"POST /caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"


@pytest.mark.parametrize(
    ("sent", "connections", "after"),
    [
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 2, 5, 0.2),
        (b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n", 150, 0.2),  # some are refused late
        (HEAD % (b"", len(png())) + png(), 5, 0.0),
        (HEAD % (b"?stream=true", len(png())) + png(), 5, 0.01),
        (HEAD % (b"", 1000) + b"a", 5, 0.1),
        (HEAD % (b"", 10**9), 150, 0.0),
        (CHUNKED, 5, 0.1),
    ],
)
def test_a_client_that_leaves_without_reading_leaves_nothing(live, sent, connections, after):
    def leave() -> None:
        clients = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(connections)]
        for client in clients:
            client.sendall(sent)
        time.sleep(after)
        for client in clients:
            client.close()  # answers lie unread: a reset

    leave()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        leave()
        until(lambda: not live.app.connections.late and live.service.inside == 0)
        time.sleep(0.5)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = {type(each).__name__ for each in gc.garbage}
        assert not left & {"_Stream", "HTTPServerRequest", "CaptionHandler", "LiveHandler"}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ServerLive"])
def test_a_refused_message_is_let_go_of(method):
    message = pb.ModelInferRequest(model_name="fake")
    tensor = message.inputs.add(name="IMAGE", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(BAD)
    port = free_port()
    with serve(fake_engine, grpc_port=port) as live:

        def on_loop(work):
            return asyncio.run_coroutine_threadsafe(work, live.loop).result(20)

        server = on_loop(start(live.service))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            path = f"/inference.GRPCInferenceService/{method}"
            kind = channel.stream_stream if "Stream" in method else channel.unary_unary
            data = message.SerializeToString()

            def ask():
                if "Stream" in method:
                    [answer] = kind(path, None, pb.ModelStreamInferResponse.FromString)(
                        iter([data])
                    )
                    assert "not an image" in answer.error_message
                else:
                    with pytest.raises(grpc.RpcError):
                        kind(path)(data)

            ask()
            with nothing_left():
                for _ in range(3):
                    ask()
        on_loop(server.stop())
