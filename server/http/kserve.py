"""The Open Inference Protocol (KServe v2) with Triton's extensions, over HTTP.

`server.protocols.kserve` says what tensors mean. https://github.com/kserve/open-inference-protocol,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

import json
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from tornado.web import HTTPError

from runtime.errors import InvalidRequest, VignetteError
from server.http.handler import Handler
from server.http.intake import IntakeHandler
from server.protocols.errors import ErrorStatus
from server.protocols.kserve import (
    EXTENSIONS,
    MOST_AXES,
    OUTPUTS,
    SERVER,
    VERSION,
    Inputs,
    check_input,
    check_outputs,
    check_shape,
    config,
    index_entry,
    metadata,
    model_of,
    packed,
    unpacked,
)
from server.requests.fields import checked
from server.requests.parts import Parts, shown

_LENGTH = "Inference-Header-Content-Length"
_PAGES = 4  # cost of statistics
_WHOLE = re.compile(r"[0-9]{1,9}")


class Tensor(BaseModel):
    """An input tensor. data: its values, or null if they follow the JSON (`binary_data_size`)."""

    name: str
    shape: Annotated[list[int], Field(max_length=MOST_AXES, fail_fast=True)]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class WantedTensor(BaseModel):
    """A requested output."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """An inference request."""

    model_config = ConfigDict(extra="forbid")

    id: str = ""
    inputs: Annotated[list[Tensor], Field(max_length=16, fail_fast=True)]
    outputs: Annotated[list[WantedTensor], Field(max_length=16, fail_fast=True)] | None = None
    parameters: dict[str, Any] = {}


class _Shape:
    """Errors in the protocol's format."""

    def shown_error(self, answer: ErrorStatus, message: str) -> Any:
        """The protocol's error body."""
        return {"error": message, "code": answer.code}


class ServerHandler(_Shape, Handler):
    """GET /v2: server metadata."""

    async def get(self) -> None:
        """The server's name, version and extensions."""
        await self.paced()
        self.write_json(SERVER | {"extensions": EXTENSIONS})


class ServerLiveHandler(_Shape, Handler):
    """GET /v2/health/live, /v2/health/ready."""

    async def get(self, kind: str) -> None:
        """200, or 503 while the server is not ready."""
        await self.paced()
        good = kind == "live" or self.service.serves
        self.set_status(200 if good else 503)
        self.write_json({kind: good})


class ModelHandler(_Shape, Handler):
    """GET /v2/models/NAME, and its /ready, /config and /stats."""

    async def get(self, name: str, version: str | None, what: str | None) -> None:
        """The model's metadata, readiness, configuration or statistics."""
        await self.paced(_PAGES if what == "stats" else 1)
        model = model_of(self.service, name, version)
        match what:
            case None:
                self.write_json(metadata(model))
            case "config":
                self.write_json(config(model))
            case "ready":
                self.set_status(200 if model.serves else 503)
                self.write_json({"name": name, "ready": model.serves})
            case "stats" if self.service.settings.ops_port is None:  # else they are private
                done = await self.service.metrics.captioned(name)
                stats = {"name": name, "version": VERSION, "inference_count": done}
                self.write_json({"model_stats": [stats]})
            case _:
                raise HTTPError(404)


class RepositoryHandler(_Shape, Handler):
    """POST /v2/repository/index: all models."""

    async def post(self) -> None:
        """The state of each model; the body is ignored."""
        await self.paced()
        self.write_json([index_entry(model) for model in self.service.models.values()])


class InferHandler(_Shape, IntakeHandler):
    """POST /v2/models/NAME/infer."""

    def check_head(self) -> None:
        """Raises UnknownModel or InvalidRequest."""
        self.asked_model = model_of(self.service, *self.path_args)
        self.model_name = self.asked_model.name
        length = self.request.headers.get(_LENGTH)
        if length is not None and not _WHOLE.fullmatch(length):
            raise InvalidRequest(f"{_LENGTH} {shown(length)} is no number")
        self._json_length = None if length is None else int(length)

    async def post(self, *path: str) -> None:
        """Drop the path's model name and version, which `check_head` has read."""
        await super().post()

    async def serve(self, body: bytes) -> None:
        """Answer with all captions, or with the first error."""
        cut = len(body) if self._json_length is None else self._json_length
        if cut > len(body):
            raise InvalidRequest(f"{_LENGTH} is {cut}, and the body has {len(body)} bytes")
        parts = await self.json_parts(body[:cut])
        self.hold(len(body) - cut)  # the images are copied out of it
        asked = checked(InferRequest, parts.fields)
        frames = self.asked_model.manifest.sizes.frames
        inputs = Inputs.of(_values(asked, parts, body[cut:], frames), frames)
        self.take_places(len(inputs.images) - 1)  # the first took its place in `prepare`
        try:
            captions = await inputs.captions(self.service, self.asked_model, self.client)
        except VignetteError:
            self.service.rates.refusals.spend(self.client, len(inputs.images) - 1)
            raise
        self.timing = captions[0].timing
        values: dict[str, list[Any]] = {
            "CAPTION": [caption.text for caption in captions],
            "SCORE": [caption.score for caption in captions],
        }
        self._answer(asked, values)

    def _answer(self, asked: InferRequest, values: dict[str, list[Any]]) -> None:
        everything = [WantedTensor(name=name, parameters=asked.parameters) for name in values]
        outputs, binary = [], []
        for wanted in asked.outputs or everything:
            datatype, found = OUTPUTS[wanted.name], values[wanted.name]
            output: dict[str, Any] = {
                "name": wanted.name,
                "datatype": datatype,
                "shape": [len(found)],
            }
            if wanted.parameters.get("binary_data", asked.parameters.get("binary_data_output")):
                data = packed(found, datatype)
                output["parameters"] = {"binary_data_size": len(data)}
                binary.append(data)
            else:
                output["data"] = found
            outputs.append(output)
        answer: dict[str, Any] = {"model_name": self.model_name, "model_version": VERSION}
        if asked.id:
            answer["id"] = asked.id
        head = json.dumps(answer | {"outputs": outputs}).encode()
        if binary:
            self.set_header(_LENGTH, str(len(head)))
            self.set_header("Content-Type", "application/octet-stream")
        else:
            self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(b"".join([head, *binary]))


def _values(
    asked: InferRequest, parts: Parts, binary: bytes, frames: int | None
) -> dict[str, list[Any]]:
    """The values of each tensor, by name. Raises InvalidRequest."""
    check_outputs([output.name for output in asked.outputs or []])
    values: dict[str, list[Any]] = {}
    at = 0
    for tensor in asked.inputs:
        check_input(tensor.name, tensor.datatype, values)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            data = tensor.data or []
            found = list(_flat(data))
            values[tensor.name] = _images(found, parts) if tensor.name == "IMAGE" else found
        elif isinstance(size, int) and 0 <= size <= len(binary) - at:
            values[tensor.name] = unpacked(tensor.name, tensor.datatype, binary[at : at + size])
            at += size
        else:
            raise InvalidRequest(f"the data of {shown(tensor.name)} is not all there")
        check_shape(tensor.name, tensor.shape, values[tensor.name], frames)
        if size is None and found != data and _ragged(data, tensor.shape):
            raise InvalidRequest(f"the lists of {shown(tensor.name)} are not as its shape tells")
    if at < len(binary):
        raise InvalidRequest(f"there are {len(binary) - at} bytes that no input holds")
    return values


def _images(places: list[Any], parts: Parts) -> list[bytes]:
    """The images that were sent in base64. places: their indices in `parts.images`."""
    return [parts.images[number] for number in places]


def _ragged(data: list[Any], shape: Sequence[int]) -> bool:
    """Whether nested lists differ from a shape."""
    if not any(isinstance(each, list) for each in data):
        return len(data) != math.prod(shape)
    lists = all(isinstance(each, list) for each in data)
    return not lists or [*shape[:1]] != [len(data)] or any(_ragged(e, shape[1:]) for e in data)


def _flat(data: list[Any]) -> Any:
    for each in data:
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield each
