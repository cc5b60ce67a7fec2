"""Triton's gRPC client, unmodified, against a server of its own process: both bring stubs."""

import itertools
import json
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from tritonclient.utils import InferenceServerException

from bench.contestants.servers import free_port
from server.settings import InvalidSettings, from_command_line
from tests.support.live import fetch, until
from tests.support.paths import ROOT, SAMPLES
from tests.support.processes import MODEL, ON_CPU, SAID, running

NAMES = ("owl.png", "donuts.png", "cats.png")
IMAGES = [(SAMPLES / name).read_bytes() for name in NAMES]
SERVICE = "inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def ports():
    port = free_port()
    with running(*ON_CPU, "--front-ends", "2", "--grpc-port", str(port)) as (_, http, _):
        yield port, http


@pytest.fixture
def client(ports):
    with triton.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
        yield client


def tensor(name: str, values: list, datatype: str = "BYTES") -> triton.InferInput:
    kind = {"BYTES": np.object_, "INT32": np.int32}[datatype]
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, kind))
    return made


def test_triton_asks_what_there_is(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready(MODEL)
    metadata = client.get_model_metadata(MODEL, as_json=True)
    assert [output["name"] for output in metadata["outputs"]] == ["CAPTION", "SCORE"]
    config = client.get_model_config(MODEL).config
    assert (config.input[0].name, config.input[1].optional) == ("IMAGE", True)
    [entry] = client.get_model_repository_index().models
    assert (entry.name, entry.state) == (MODEL, "READY")


def test_triton_captions_several_images_in_one_call(client):
    result = client.infer(MODEL, [tensor("IMAGE", IMAGES)], request_id="7")
    captions = [caption.decode() for caption in result.as_numpy("CAPTION")]
    assert captions == [SAID[name]["caption"] for name in NAMES]
    assert (result.as_numpy("SCORE") < 0).all()
    assert result.get_response().id == "7"
    stats = client.get_inference_statistics(MODEL).model_stats[0]
    assert stats.inference_count >= 1


def test_many_clients_at_once_get_their_own(ports):
    def ask(place: int) -> str:
        with triton.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:
            result = client.infer(MODEL, [tensor("IMAGE", [IMAGES[place % 3]])])
            return result.as_numpy("CAPTION")[0].decode()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(24)))
    assert found == [SAID[NAMES[place % 3]]["caption"] for place in range(24)]


def test_a_question_and_beams(client):
    inputs = [
        tensor("IMAGE", IMAGES[2:]), tensor("PROMPT", ["how many cats are there"]),
        tensor("NUM_BEAMS", [2], "INT32"), tensor("MAX_NEW_TOKENS", [5], "INT32"),
    ]  # fmt: skip
    assert client.infer(MODEL, inputs).as_numpy("CAPTION")[0] == b"two"


def test_a_stream_has_a_response_for_each_token(client):
    told: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: told.put((result, error)))
    client.async_stream_infer(MODEL, [tensor("IMAGE", IMAGES[:1])])
    texts, last = [], False
    while not last:
        result, error = told.get(timeout=30)
        assert error is None
        texts.append(result.as_numpy("CAPTION")[0].decode())
        last = result.get_response().parameters["triton_final_response"].bool_param
    assert texts[-1] == SAID["owl.png"]["caption"]
    assert len(texts) >= len(texts[-1].split())
    assert all(longer.startswith(text) for text, longer in itertools.pairwise(texts))
    client.async_stream_infer(MODEL, [tensor("IMAGE", [b"no image"])])
    result, error = told.get(timeout=30)
    assert "not an image" in str(error)
    client.async_stream_infer(MODEL, [tensor("IMAGE", IMAGES[:1])])
    assert told.get(timeout=30)[1] is None, "the stream goes on"
    client.stop_stream()


@pytest.mark.parametrize(
    ("model", "images", "status", "message"),
    [
        ("none", IMAGES[:1], "StatusCode.NOT_FOUND", f"name one of {MODEL}"),
        (MODEL, [b"no image"], "StatusCode.INVALID_ARGUMENT", "not an image"),
        (MODEL, IMAGES[:1] * 65, "StatusCode.INVALID_ARGUMENT", "1 to 64"),
    ],
)
def test_errors_are_the_protocols_own(client, model, images, status, message):
    with pytest.raises(InferenceServerException, match=message) as error:
        client.infer(model, [tensor("IMAGE", images)])
    assert error.value.status() == status


def test_there_is_one_version_of_a_model(client):
    asked = [tensor("IMAGE", IMAGES[:1])]
    assert client.infer(MODEL, asked, model_version="1").as_numpy("CAPTION") is not None
    for call in (partial(client.infer, inputs=asked), client.is_model_ready,
                 client.get_model_metadata, client.get_model_config):  # fmt: skip
        with pytest.raises(InferenceServerException, match="no such version") as error:
            call(MODEL, model_version="2")
        assert error.value.status() == "StatusCode.NOT_FOUND"


def test_a_deadline_and_a_call_that_is_taken_back_free_their_places(ports, client):
    with pytest.raises(InferenceServerException) as error:
        client.infer(MODEL, [tensor("IMAGE", IMAGES)], client_timeout=0.001)
    assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    call = client.async_infer(MODEL, [tensor("IMAGE", IMAGES * 20)], lambda result, error: None)
    call.cancel()

    def inside() -> bool:
        text = fetch(ports[1], "GET", "/metrics").body.decode()
        return f'vignette_requests_inside{{model="{MODEL}"}} 0.0' in text

    until(inside)


def test_health_and_reflection_are_the_standard_ones(ports):
    with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()


def test_keys_come_in_the_metadata_and_tls_by_files(tmp_path):
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    line = subprocess.run(
        [sys.executable, "-m", "server.service.keys", "me"], cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / "keys").write_text(line.stdout)
    key, port = line.stderr.split()[-1], free_port()
    tls = (
        "--grpc-certificate",
        str(tmp_path / "cert.pem"),
        "--grpc-key",
        str(tmp_path / "key.pem"),
    )
    flags = (*ON_CPU, "--api-keys", str(tmp_path / "keys"), "--grpc-port", str(port), *tls)
    with (
        running(*flags),
        triton.InferenceServerClient(
            f"localhost:{port}", ssl=True, root_certificates=str(tmp_path / "cert.pem")
        ) as client,
    ):
        with pytest.raises(InferenceServerException) as error:
            client.infer(MODEL, [tensor("IMAGE", IMAGES[:1])])
        assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        ours = {"authorization": f"Bearer {key}"}
        result = client.infer(MODEL, [tensor("IMAGE", IMAGES[:1])], headers=ours)
        assert result.as_numpy("CAPTION")[0].decode() == SAID["owl.png"]["caption"]


def test_half_of_a_certificate_is_refused():
    with pytest.raises(InvalidSettings, match="go together"):
        from_command_line(["--grpc-port", "8001", "--grpc-key", "key.pem"])


def test_the_stubs_are_those_of_the_proto_files():
    """Names and numbers of all fields."""
    code = (
        "import json;from server.grpc.stubs import grpc_service_pb2 as pb;"
        "print(json.dumps({n: {f.name: f.number for f in m.fields}"
        " for n, m in pb.DESCRIPTOR.message_types_by_name.items()}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    messages = json.loads(found.stdout)
    proto = (ROOT / "server" / "grpc" / "stubs" / "grpc_service.proto").read_text()
    for name, fields in messages.items():
        [content] = re.findall(rf"^message {name}\b.*?^}}", proto, re.MULTILINE | re.DOTALL)
        for field, number in fields.items():
            assert re.search(rf"\b{field} = {number};", content), (name, field)
