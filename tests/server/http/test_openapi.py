"""openapi.json says what the handlers do: routes, fields, error codes."""

import base64
import importlib
import io
import json
import re
import subprocess
import sys

import msgspec
import pytest

from runtime.request import RANGES, Priority
from server.http.answers import CaptionAnswer, ModelsAnswer, ReadyAnswer
from server.http.app import make_app
from server.http.errors import HTTP_ERRORS
from server.protocols.errors import ERRORS, INTERNAL
from server.requests.fields import CaptionFields
from tests.support.fakes import fake_engine
from tests.support.live import png, serve

_PAGES = ("samples", "static", "docs")  # for browsers


@pytest.fixture(scope="module")
def live():
    with serve(fake_engine) as server:
        yield server


@pytest.fixture(scope="module")
def document(live):
    return live.request("GET", "/openapi.json").json


def test_every_route_is_documented(live, document):
    rules = make_app(live.service).wildcard_router.rules
    routes = [rule.matcher.regex for rule in rules]
    routes = [r for r in routes if not any(page in r.pattern for page in _PAGES)]
    paths = {path.replace("{name}", "fake"): item for path, item in document["paths"].items()}
    for route in routes:
        assert any(map(route.match, paths)), route
    for path, item in paths.items():
        for method in item:
            assert live.request(method.upper(), path, b"").status not in (404, 405), path


def test_every_error_is_documented(document):
    known = {a.code for a in (*ERRORS.values(), *HTTP_ERRORS.values(), INTERNAL)}
    detail = document["components"]["schemas"]["ErrorDetail"]
    assert set(detail["properties"]["code"]["enum"]) == known
    statuses = {str(a.status) for a in (*ERRORS.values(), INTERNAL)}
    assert set(document["paths"]["/caption"]["post"]["responses"]) == {"200", "431", *statuses}


def test_every_field_is_documented(document):
    schemas, fields = document["components"]["schemas"], set(CaptionFields.model_fields)
    assert set(schemas["CaptionForm"]["properties"]) == {"image", "video", *fields}
    assert set(schemas["CaptionRequest"]["properties"]) == {
        "image",
        "images",
        "image_url",
        "video",
        *fields,
    }
    parameters = document["paths"]["/caption"]["post"]["parameters"]
    assert {p["name"] for p in parameters if p["in"] == "query"} == fields
    assert schemas["Priority"]["enum"] == list(Priority)
    temperature, _ = schemas["CaptionRequest"]["properties"]["temperature"]["anyOf"]
    assert (temperature["minimum"], temperature["maximum"]) == RANGES["temperature"]
    assert not re.search('"(ge|gt|le|lt)":', json.dumps(document)), "no keywords of JSON Schema"
    assert "prompt" in fields and schemas["CaptionForm"]["properties"]["prompt"]["description"]


def test_answers_have_the_documented_shape(live, document):
    for method, path, body, shape in (
        ("POST", "/caption?n=2&temperature=1&logprobs=2", png(), CaptionAnswer),
        ("GET", "/health/ready", None, ReadyAnswer),
        ("GET", "/v1/models", None, ModelsAnswer),
    ):
        answer = live.request(method, path, body).json
        assert set(answer) == set(document["components"]["schemas"][shape.__name__]["properties"])
        assert msgspec.to_builtins(msgspec.convert(answer, shape)) == answer


def test_references_lead_somewhere(document):
    text = json.dumps(document)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', text):
        part = document
        for name in reference.split("/"):
            part = part[name]


def test_a_client_that_is_generated_from_it_can_call(live, tmp_path, monkeypatch):
    document = tmp_path / "openapi.json"
    document.write_bytes(live.request("GET", "/openapi.json").body)
    config = tmp_path / "config.yml"
    config.write_text("post_hooks: []\n")  # it would want ruff on the PATH
    tool = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(document)]
    output = ["--meta", "none", "--output-path", str(tmp_path / "vignette_client")]
    done = subprocess.run(
        [*tool, *output, "--config", str(config)], capture_output=True, text=True, check=True
    )
    assert "arning" not in done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    client = importlib.import_module("vignette_client").Client(f"http://127.0.0.1:{live.port}")
    caption = importlib.import_module("vignette_client.api.default.caption")
    models = importlib.import_module("vignette_client.models")
    file = importlib.import_module("vignette_client.types").File
    expected = live.caption(png(), "?max_new_tokens=5").json["caption"]
    image = base64.b64encode(png()).decode()
    answers = [
        caption.sync(client=client, body=file(io.BytesIO(png())), max_new_tokens=5),
        caption.sync(client=client, body=models.CaptionRequest(image=image, max_new_tokens=5)),
        caption.sync(
            client=client,
            body=models.CaptionForm(
                image=file(io.BytesIO(png()), "x.png", "image/png"), max_new_tokens=5
            ),
        ),
    ]
    assert [answer.caption for answer in answers] == [expected] * 3
    refused = caption.sync(client=client, body=file(io.BytesIO(b"?")))
    assert refused.error.code == "invalid_image"
    client.get_httpx_client().close()
