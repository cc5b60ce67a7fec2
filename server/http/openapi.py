"""The OpenAPI document: routes from openapi.json, schemas from request and response types."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from msgspec.json import schema_components
from pydantic.json_schema import models_json_schema

from server.http.answers import CaptionAnswer, ErrorAnswer, ModelsAnswer, ReadyAnswer
from server.http.errors import HTTP_ERRORS
from server.http.kserve import InferRequest
from server.http.openai import ChatRequest
from server.http.schemas import CaptionRequest
from server.protocols.errors import ERRORS, INTERNAL
from server.protocols.kserve import SERVER
from server.requests.fields import CaptionFields

_ROUTES = Path(__file__).with_name("openapi.json")
_TAKEN = (ChatRequest, InferRequest, CaptionFields, CaptionRequest)
_ANSWERED = (CaptionAnswer, ErrorAnswer, ModelsAnswer, ReadyAnswer)
_REFERENCE = "#/components/schemas/{%s}"


@cache
def document() -> str:
    """The document as JSON text."""
    content = json.loads(_ROUTES.read_text())
    content["info"]["version"] = SERVER["version"]
    _, defined = models_json_schema(
        [(shape, "validation") for shape in _TAKEN], ref_template=_REFERENCE % "model"
    )
    _, answered = schema_components(_ANSWERED, ref_template=_REFERENCE % "name")
    schemas: dict[str, Any] = defined["$defs"] | answered
    fields = schemas.pop(CaptionFields.__name__)
    schemas["CaptionForm"] = {
        **fields,
        "title": "CaptionForm",
        "properties": {
            **{name: {"$ref": "#/components/schemas/Image"} for name in ("image", "video")},
            **fields["properties"],
        },
    }
    codes = {answer.code for answer in (*ERRORS.values(), *HTTP_ERRORS.values(), INTERNAL)}
    schemas["ErrorDetail"]["properties"]["code"]["enum"] = sorted(codes)
    content["components"]["schemas"] |= schemas
    content["paths"]["/caption"]["post"]["parameters"] += [
        {"name": name, "in": "query", "schema": schema}
        for name, schema in fields["properties"].items()
    ]
    return json.dumps(content, indent=1)
