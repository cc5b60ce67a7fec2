"""openapi.json says what the handlers do: routes, fields, error codes."""

import json
import re

import pytest

from server.app import make_app
from server.errors import ERRORS, HTTP_ERRORS, INTERNAL
from server.forms import _FIELDS, _PRIORITIES
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
    routes = {rule.matcher._path for rule in make_app(live.service).wildcard_router.rules}
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
    body = content["application/json"]["schema"]["properties"]
    assert set(form) == {"image", *_FIELDS}
    assert set(body) == {"image", "image_url", *_FIELDS}
    query = document["paths"]["/caption"]["post"]["parameters"]
    named = {p["$ref"].rpartition("/")[2] for p in query if "$ref" in p}
    assert named == set(_FIELDS)
    assert document["components"]["schemas"]["Priority"]["enum"] == list(_PRIORITIES)


def test_answers_have_the_documented_shape(live, document):
    caption = live.caption(png()).json
    assert set(caption) == set(document["components"]["schemas"]["Caption"]["required"])
    ready = live.request("GET", "/health/ready").json
    assert set(ready) == set(document["components"]["schemas"]["Ready"]["required"])


def test_references_lead_somewhere(document):
    text = (ROOT / "server" / "openapi.json").read_text()
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', text):
        part = document
        for name in reference.split("/"):
            part = part[name]
    assert json.loads(text) == document
