"""openapi.json says what the handlers do: routes, fields, error codes."""

import base64
import importlib
import io
import json
import re
import subprocess
import sys

import pytest

from runtime.request import Priority
from server.http.app import make_app
from server.http.errors import ERRORS, HTTP_ERRORS, INTERNAL
from server.http.forms import _FIELDS
from tests.conftest import ROOT
from tests.fakes import fake_engine
from tests.live import png, serve


@pytest.fixture(scope="module")
def live():
    with serve(fake_engine) as server:
        yield server


@pytest.fixture(scope="module")
def document(live):
    return live.request("GET", "/openapi.json").json


def test_every_route_is_documented(live, document):
    rules = make_app(live.service).wildcard_router.rules
    routes = {rule.matcher._path for rule in rules} - {"/samples/%s"}  # a part of the page
    assert set(document["paths"]) == routes
    for path, item in document["paths"].items():
        for method in item:
            assert live.request(method.upper(), path, b"").status not in (404, 405)


def test_every_error_is_documented(document):
    known = {a.code for a in (*ERRORS.values(), *HTTP_ERRORS.values(), INTERNAL)}
    error = document["components"]["schemas"]["Error"]["properties"]["error"]
    assert set(error["properties"]["code"]["enum"]) == known
    statuses = {str(a.status) for a in (*ERRORS.values(), INTERNAL)}
    assert set(document["paths"]["/caption"]["post"]["responses"]) == {"200", *statuses}


def test_every_field_is_documented(document):
    content = document["paths"]["/caption"]["post"]["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]["properties"]
    body = document["components"]["schemas"]["CaptionRequest"]["properties"]
    assert set(form) == {"image", *_FIELDS}
    assert set(body) == {"image", "image_url", *_FIELDS}
    query = document["paths"]["/caption"]["post"]["parameters"]
    named = {p["$ref"].rpartition("/")[2] for p in query if "$ref" in p}
    assert named == set(_FIELDS)
    assert document["components"]["schemas"]["Priority"]["enum"] == list(Priority)


def test_answers_have_the_documented_shape(live, document):
    caption = live.caption(png()).json
    assert set(caption) == set(document["components"]["schemas"]["Caption"]["required"])
    ready = live.request("GET", "/health/ready").json
    assert set(ready) == set(document["components"]["schemas"]["Ready"]["required"])


def test_references_lead_somewhere(document):
    text = (ROOT / "server" / "http" / "openapi.json").read_text()
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', text):
        part = document
        for name in reference.split("/"):
            part = part[name]
    assert json.loads(text) == document


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
            body=models.CaptionFilesBody(
                image=file(io.BytesIO(png()), "x.png", "image/png"), max_new_tokens=5
            ),
        ),
    ]
    assert [answer.caption for answer in answers] == [expected] * 3
    refused = caption.sync(client=client, body=file(io.BytesIO(b"?")))
    assert refused.error.code == "invalid_image"
    client.get_httpx_client().close()
