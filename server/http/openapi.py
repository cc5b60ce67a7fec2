"""The OpenAPI document: routes from openapi.json, all that they take and answer from `schemas`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from server.errors import ERRORS, HTTP_ERRORS, INTERNAL
from server.http.kserve import InferRequest
from server.http.openai import ChatRequest
from server.http.schemas import (
    CaptionAnswer,
    CaptionFields,
    CaptionRequest,
    ErrorAnswer,
    ReadyAnswer,
    SeveralAnswer,
)

_ROUTES = Path(__file__).with_name("openapi.json")
_SHAPES = (
    ChatRequest,
    InferRequest,
    CaptionFields,
    CaptionRequest,
    CaptionAnswer,
    ErrorAnswer,
    ReadyAnswer,
    SeveralAnswer,
)
_REFERENCE = "#/components/schemas/{model}"


@cache
def document() -> str:
    """As it is sent."""
    content = json.loads(_ROUTES.read_text())
    _, defined = models_json_schema(
        [(shape, "validation") for shape in _SHAPES], ref_template=_REFERENCE
    )
    schemas: dict[str, Any] = defined["$defs"]
    fields = schemas.pop(CaptionFields.__name__)
    schemas["CaptionForm"] = {
        **fields,
        "title": "CaptionForm",
        "properties": {
            **{name: {"$ref": _REFERENCE.format(model="Image")} for name in ("image", "video")},
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
