"""Triton's client, unmodified, and the wire format by hand."""

import json
from functools import partial

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from runtime.errors import InvalidRequest
from runtime.planning.config import EngineConfig
from server.protocols.kserve import check_shape
from server.service.keys import main as make_key
from tests.support.fakes import fake_engine, video_engine
from tests.support.live import JSON, as_json, b64, png, serve

IMAGES = [png((n, 2, 3), size=(150, 150)) for n in range(3)]
INFER = "/v2/models/fake/infer"


@pytest.fixture(scope="module")
def live():
    with serve(lambda: fake_engine(EngineConfig(slots=8, patience=0)), slots=8) as server:
        yield server


@pytest.fixture
def client(live):
    client = triton.InferenceServerClient(f"127.0.0.1:{live.port}")
    yield client
    client.close()


def tensor(name: str, values: list, datatype: str = "BYTES") -> triton.InferInput:
    kind = {"BYTES": np.object_, "INT32": np.int32}[datatype]
    made = triton.InferInput(name, [len(values)], datatype)
    made.set_data_from_numpy(np.array(values, kind))
    return made


def said(live, image: bytes, query: str = "") -> str:
    return live.caption(image, query).json["caption"]


def test_triton_asks_what_there_is(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("fake")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("fake")
    assert metadata["inputs"][0] == {"name": "IMAGE", "datatype": "BYTES", "shape": [-1]}
    assert [output["name"] for output in metadata["outputs"]] == ["CAPTION", "SCORE"]
    assert client.get_model_config("fake")["max_batch_size"] == 0
    [entry] = client.get_model_repository_index()
    assert (entry["name"], entry["state"]) == ("fake", "READY")


def test_a_video_model_takes_the_frames_of_clips():
    with serve(partial(video_engine, 3), manifest=video_engine(3).manifest) as live:
        client = triton.InferenceServerClient(f"127.0.0.1:{live.port}")
        clips = [[png((n, place, 3)) for place in range(3)] for n in range(2)]
        expected = [
            live.caption(as_json(image=[b64(frame) for frame in clip]), **JSON).json["caption"]
            for clip in clips
        ]
        frames = [frame for clip in clips for frame in clip]
        result = client.infer("fake", [tensor("IMAGE", frames)])
        assert [text.decode() for text in result.as_numpy("CAPTION")] == expected
        with pytest.raises(InferenceServerException, match="takes 3 frames of a clip each"):
            client.infer("fake", [tensor("IMAGE", frames[:4])])
        by_clip = [[b64(frame) for frame in clip] for clip in clips]
        flat = [frame for clip in by_clip for frame in clip]
        for shape, data, wrong in (
            ([2, 3], by_clip, None),
            ([2, 3], flat, None),
            ([6], flat, None),
            ([6, 1], flat, None),
            ([1, 6], flat, None),
            ([3, 2], flat, "last axis does not hold the 3 frames"),
            ([-2, -3], flat, "negative"),
            ([2, 3], [by_clip[0][:2], [by_clip[0][2], *by_clip[1]]], "not as its shape tells"),
        ):
            given = {"name": "IMAGE", "datatype": "BYTES", "shape": shape, "data": data}
            answer = live.request("POST", INFER, as_json(inputs=[given]), **JSON)
            if wrong is None:
                assert answer.json["outputs"][0]["data"] == expected
            else:
                assert answer.status == 400 and wrong in answer.json["error"]
        client.close()


def test_paths_with_a_model_in_them_know_head_and_preflights():
    with serve(fake_engine, cors_origins=("https://a.example",)) as live:
        for path in ("/v2/models/fake", "/v2/models/fake/versions/1/config"):
            assert live.request("HEAD", path).status == 200
        assert live.request("HEAD", "/samples/owl.png").status == 404  # they are the demo model's
        reply = live.request("OPTIONS", INFER, Origin="https://a.example")
        assert reply.status == 204
        assert live.request("GET", INFER).status == 405


def test_of_an_unknown_version_it_is_said_which_there_is():
    with serve(fake_engine) as live:
        for path in ("/v2/models/fake/versions/2", "/v2/models/fake/versions/2/ready"):
            answer = live.request("GET", path)
            assert answer.status == 404
            assert "no such version here: ask for 1" in answer.json["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_triton_captions_several_images_in_one_call(live, client, binary):
    before = client.get_inference_statistics("fake")["model_stats"][0]["inference_count"]
    outputs = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("CAPTION", "SCORE")]
    result = client.infer("fake", [tensor("IMAGE", IMAGES)], outputs=outputs, request_id="7")
    captions = [c.decode() if binary else c for c in result.as_numpy("CAPTION").tolist()]
    assert captions == [said(live, image) for image in IMAGES]
    assert (result.as_numpy("SCORE") < 0).all()
    assert result.get_response()["id"] == "7"
    after = client.get_inference_statistics("fake")["model_stats"][0]["inference_count"]
    assert after > before


def test_triton_gives_prompts_and_parameters(live, client):
    inputs = [
        tensor("IMAGE", IMAGES), tensor("PROMPT", ["3 4", "5", "6"]),
        tensor("MAX_NEW_TOKENS", [5], "INT32"), tensor("NUM_BEAMS", [2], "INT32"),
    ]  # fmt: skip
    captions = client.infer("fake", inputs).as_numpy("CAPTION").tolist()
    expected = [
        said(live, image, f"?prompt={prompt}&max_new_tokens=5&num_beams=2")
        for image, prompt in zip(IMAGES, ("3+4", "5", "6"), strict=True)
    ]
    assert [caption.decode() for caption in captions] == expected


def test_images_may_come_in_json(live):
    body = as_json(
        inputs=[
            {
                "name": "IMAGE",
                "shape": [2],
                "datatype": "BYTES",
                "data": list(map(b64, IMAGES[:2])),
            },
            {"name": "PROMPT", "shape": [1, 1], "datatype": "BYTES", "data": [["3"]]},
        ]
    )
    answer = live.request("POST", INFER, body, **JSON).json
    [caption, score] = answer["outputs"]
    assert caption["data"] == [said(live, image, "?prompt=3") for image in IMAGES[:2]]
    assert (caption["shape"], score["datatype"]) == ([2], "FP32")


def test_one_bad_image_is_the_calls_error_and_the_next_call_goes_on(live, client):
    with pytest.raises(InferenceServerException, match="not an image"):
        client.infer("fake", [tensor("IMAGE", [*IMAGES, b"no image"])])
    assert client.infer("fake", [tensor("IMAGE", IMAGES[:1])]).as_numpy("CAPTION").size == 1
    with pytest.raises(InferenceServerException, match="name one of fake"):
        client.infer("none", [tensor("IMAGE", IMAGES[:1])])


def test_each_image_counts_for_the_limits_of_its_key(tmp_path, capsys):
    assert make_key(["me", "0", "2"]) == 0
    made = capsys.readouterr()
    (tmp_path / "keys").write_text(made.out)
    key = {"X_API_Key": made.err.split()[-1]}
    with serve(fake_engine, api_keys=tmp_path / "keys") as live:
        for count, status in ((2, 200), (3, 400), (2, 200)):
            body = as_json(inputs=[image(data=list(map(b64, IMAGES[:count])))])
            assert live.request("POST", INFER, body, **JSON, **key).status == status


def image(**changes) -> dict:
    made = {"name": "IMAGE", "datatype": "BYTES", "data": [b64(IMAGES[0])]} | changes
    return {"shape": [1 if made["data"] is None else len(made["data"])]} | made


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "inputs"),
        ({"inputs": []}, "IMAGE must hold 1 to 64"),
        ({"inputs": [image(data=[0])]}, "send it as base64"),
        ({"inputs": [image(data=[b64(IMAGES[0]), 7])]}, "send it as base64"),
        ({"inputs": [image(data=["\0" + "0"])]}, "zero character"),
        ({"inputs": [image()], "outputs": [{"name": "CAPTION"}] * 2}, "asked for twice"),
        ({"inputs": [image(shape=[2, 3])]}, "IMAGE' has 1 values, unlike its shape"),
        ({"inputs": [image(datatype="FP32")]}, "IMAGE must be BYTES"),
        ({"inputs": [image(), image()]}, "the input IMAGE is given twice"),
        ({"inputs": [image(), image(name="COLOUR", data=[])]}, "unknown input 'COLOUR'"),
        ({"inputs": [image()], "outputs": [{"name": "X"}]}, "unknown output 'X'"),
        ({"inputs": [image(parameters={"binary_data_size": 9})]}, "not all there"),
        ({"inputs": [image(parameters={"binary_data_size": -1})]}, "not all there"),
        ({"inputs": [image(), image(name="NUM_BEAMS", datatype="INT32", data=[9])]}, "num_beams"),
        ({"inputs": [image(), image(name="PROMPT", data=[5])]}, "PROMPT must hold text"),
        ({"inputs": [image(), image(name="PROMPT", data=[{"a": 1}])]}, "PROMPT must hold text"),
        (
            {"inputs": [image(), image(name="NUM_BEAMS", datatype="INT32", data=[2, 2])]},
            "NUM_BEAMS must hold one number",
        ),
        (
            {"inputs": [image(data=[b64(IMAGES[0])] * 3), image(name="PROMPT", data=["3", "4"])]},
            "PROMPT must hold one prompt",
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_named(live, content, complaint):
    reply = live.request("POST", INFER, as_json(**content), **JSON)
    assert (reply.status, reply.json["code"]) == (400, "invalid_request")
    assert complaint in reply.json["error"]


def test_a_shape_of_thousands_of_axes_is_not_multiplied():
    with pytest.raises(InvalidRequest, match="has 65000 axes"):
        check_shape("IMAGE", [127] * 65_000, [b""])


@pytest.mark.parametrize("tail", [b"\xff\xff\xff\xff", b"\x09\0\0\0short", b"\x01\0"])
def test_binary_data_that_ends_too_soon_is_told(live, tail):
    head = json.dumps({"inputs": [image(data=None, parameters={"binary_data_size": len(tail)})]})
    length = {"Inference_Header_Content_Length": str(len(head))}
    reply = live.request("POST", INFER, head.encode() + tail, **length)
    assert reply.status == 400 and "ends within an element" in reply.json["error"]
    more = live.request("POST", INFER, head.encode() + tail + b"more", **length)
    assert more.status == 400
    odd = live.request("POST", INFER, head.encode(), Inference_Header_Content_Length="many")
    assert odd.status == 400 and "no number" in odd.json["error"]
