"""The Open Inference Protocol (KServe v2) with Triton's extensions, over HTTP.

A model takes IMAGE, one or several encoded images, each of which is captioned by itself.
https://github.com/kserve/open-inference-protocol,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

import asyncio
import json
import re
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel
from tornado.web import HTTPError

from runtime.errors import InvalidRequest
from runtime.request import Caption, captioned
from server.bodies import Parts, shown
from server.http.caption import whole
from server.http.errors import Answer
from server.http.handler import Handler
from server.http.intake import IntakeHandler
from server.http.schemas import CaptionFields, checked
from server.service.model import Model

_LENGTH = "Inference-Header-Content-Length"
_WHOLE = re.compile(r"[0-9]{1,9}")
_VERSION = "1"
_PLATFORM = "onnxruntime_git"
_INPUTS = {"IMAGE": "BYTES", "PROMPT": "BYTES", "MAX_NEW_TOKENS": "INT32", "NUM_BEAMS": "INT32"}
_OUTPUTS = {"CAPTION": "BYTES", "SCORE": "FP32"}
_NUMBERS = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
_SIZE = 4  # bytes before each element of a BYTES tensor
_MOST_IMAGES = 64  # of one call
_CONFIG_TYPES = {"BYTES": "TYPE_STRING", "INT32": "TYPE_INT32", "FP32": "TYPE_FP32"}


class Tensor(BaseModel):
    """A tensor as it is sent; its data in JSON, or behind it (`binary_data_size`)."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class WantedTensor(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """A call."""

    id: str = ""
    inputs: list[Tensor]
    outputs: list[WantedTensor] | None = None
    parameters: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call asks for: images, a prompt for each or none, and fields of SamplingParams."""

    images: list[bytes]
    prompts: list[str | None]
    sampling: dict[str, Any]

    @classmethod
    def of(cls, tensors: dict[str, list[Any]]) -> "Inputs":
        """From values by the names of tensors. Raises InvalidRequest."""
        if unknown := sorted(tensors.keys() - _INPUTS.keys()):
            raise InvalidRequest(
                f"unknown input {shown(unknown[0])}: there are {', '.join(_INPUTS)}"
            )
        images = tensors.get("IMAGE", [])
        if not 0 < len(images) <= _MOST_IMAGES:
            raise InvalidRequest(f"IMAGE must hold 1 to {_MOST_IMAGES} encoded images")
        prompts: list[str | None] = [_text(prompt) for prompt in tensors.get("PROMPT", [])]
        prompts = prompts or [None]
        if len(prompts) not in (1, len(images)):
            raise InvalidRequest("PROMPT must hold one prompt, or one for each image")
        asked = {}
        for name in ("MAX_NEW_TOKENS", "NUM_BEAMS"):
            if values := tensors.get(name):
                if len(values) != 1:
                    raise InvalidRequest(f"{name} must hold one number")
                asked[name.lower()] = values[0]
        several = prompts if len(prompts) == len(images) else prompts * len(images)
        return cls(images, several, checked(CaptionFields, asked).sampling)


def _text(prompt: str | bytes) -> str:
    try:
        return prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as cause:
        raise InvalidRequest("PROMPT is not UTF-8") from cause


def unpacked(tensor: Tensor, data: bytes) -> list[Any]:
    """Values of a tensor that came as bytes. Raises InvalidRequest."""
    if tensor.datatype in _NUMBERS:
        kind = np.dtype(_NUMBERS[tensor.datatype])
        if len(data) % kind.itemsize:
            raise InvalidRequest(f"{shown(tensor.name)} holds a part of a number")
        return np.frombuffer(data, kind.newbyteorder("<")).tolist()
    values: list[Any] = []
    at = 0
    while at < len(data) and len(values) <= _MOST_IMAGES:
        end = at + _SIZE + int.from_bytes(data[at : at + _SIZE], "little")
        if at + _SIZE > len(data) or end > len(data):
            raise InvalidRequest(f"{shown(tensor.name)} ends within an element")
        values.append(data[at + _SIZE : end])
        at = end
    return values


def packed(values: list[Any], datatype: str) -> bytes:
    """Values of a tensor as bytes."""
    if datatype in _NUMBERS:
        return np.array(values, _NUMBERS[datatype]).tobytes()
    texts = [value.encode() for value in values]
    return b"".join(len(text).to_bytes(_SIZE, "little") + text for text in texts)


def metadata(model: Model) -> dict[str, Any]:
    """Inputs and outputs of a model."""

    def tensors(kinds: dict[str, str]) -> list[dict[str, Any]]:
        return [{"name": n, "datatype": kind, "shape": [-1]} for n, kind in kinds.items()]

    return {
        "name": model.name,
        "versions": [_VERSION],
        "platform": _PLATFORM,
        "inputs": tensors(_INPUTS),
        "outputs": tensors(_OUTPUTS),
    }


def config(model: Model) -> dict[str, Any]:
    """As Triton's model configuration."""

    def tensors(kinds: dict[str, str], **more: Any) -> list[dict[str, Any]]:
        return [
            {"name": n, "data_type": _CONFIG_TYPES[kind], "dims": [-1]}
            | (more if n != "IMAGE" else {})
            for n, kind in kinds.items()
        ]

    return {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": tensors(_INPUTS, optional=True),
        "output": tensors(_OUTPUTS),
    }


class _Shape:
    """Errors as the protocol has them."""

    def shown_error(self, answer: Answer, message: str) -> dict[str, Any]:
        """As clients of the protocol read it."""
        return {"error": message, "code": answer.code}


class ServerHandler(_Shape, Handler):
    """GET /v2: what this server is."""

    async def get(self) -> None:
        """Its name and extensions."""
        await self.paced()
        extensions = ["binary_tensor_data", "model_configuration", "model_repository", "statistics"]
        self.write_json({"name": "vignette", "version": "0.1.0", "extensions": extensions})


class LiveHandler(_Shape, Handler):
    """GET /v2/health/live, /v2/health/ready."""

    async def get(self, kind: str) -> None:
        """200, or 503 while it is not ready."""
        await self.paced()
        good = kind == "live" or self.service.serves
        self.set_status(200 if good else 503)
        self.write_json({kind: good})


class ModelHandler(_Shape, Handler):
    """GET /v2/models/NAME, and /ready, /config, /stats of it."""

    async def get(self, name: str, what: str | None) -> None:
        """What there is to know of a model."""
        await self.paced()
        model = self.service.model(name)
        match what:
            case None:
                self.write_json(metadata(model))
            case "config":
                self.write_json(config(model))
            case "ready":
                self.set_status(200 if model.serves else 503)
                self.write_json({"name": name, "ready": model.serves})
            case "stats":
                counted = (await self.service.metrics.rendered()).decode()
                stats = {
                    "name": name,
                    "version": _VERSION,
                    "inference_count": _captioned(counted, name),
                }
                self.write_json({"model_stats": [stats]})
            case _:
                raise HTTPError(404)


def _captioned(metrics: str, model: str) -> int:
    """Requests of a model that got their captions."""
    wanted = {"model": model, "outcome": "ok"}
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "vignette_requests_total" and sample.labels == wanted
    )


class RepositoryHandler(_Shape, IntakeHandler):
    """POST /v2/repository/index: all models."""

    def check_head(self) -> None:
        """Whatever it is, it is not looked at."""

    async def serve(self, body: bytes) -> None:
        """Their states."""
        self.write_json(
            [
                {
                    "name": model.name,
                    "version": _VERSION,
                    "state": "READY" if model.serves else "UNAVAILABLE",
                    "reason": "" if model.serves else model.status,
                }
                for model in self.service.models.values()
            ]
        )


class InferHandler(_Shape, IntakeHandler):
    """POST /v2/models/NAME/infer."""

    def check_head(self) -> None:
        """Raises UnknownModel for what is not served here, or InvalidRequest."""
        self.asked_model = self.service.model(self.path_args[0])
        self.model = self.asked_model.name
        length = self.request.headers.get(_LENGTH)
        if length is not None and not _WHOLE.fullmatch(length):
            raise InvalidRequest(f"{_LENGTH} {shown(length)} is no number")
        self._json_length = None if length is None else int(length)

    async def post(self, *path: str) -> None:
        """The name of the model is known from the head."""
        await super().post()

    async def serve(self, body: bytes) -> None:
        """Answer with all captions, or with the first error."""
        cut = len(body) if self._json_length is None else self._json_length
        parts = await self.json_parts(body[:cut])
        asked = checked(InferRequest, parts.fields)
        inputs = Inputs.of(_values(asked, parts, body[cut:]))
        for _ in inputs.images[1:]:  # the first has one since the head of the request
            self.take_place()
        captions = await self._captions(inputs)
        values: dict[str, list[Any]] = {
            "CAPTION": [caption.text for caption in captions],
            "SCORE": [caption.score for caption in captions],
        }
        self._answer(asked, values)

    async def _captions(self, inputs: Inputs) -> list[Caption]:
        """Of all images, side by side; the first error takes the others back."""
        each = zip(inputs.images, inputs.prompts, strict=True)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._caption(image, prompt, inputs.sampling))
                    for image, prompt in each
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _caption(self, image: bytes, prompt: str | None, sampling: dict[str, Any]) -> Caption:
        model = self.asked_model
        request = model.request(prompt, sampling)
        generated = self.service.generate(model, request, [image], self.client)
        async with aclosing(generated) as outputs:
            return captioned(request, await whole(outputs), model.tokenizer)

    def _answer(self, asked: InferRequest, values: dict[str, list[Any]]) -> None:
        everything = [WantedTensor(name=name, parameters=asked.parameters) for name in values]
        outputs, binary = [], []
        for wanted in asked.outputs or everything:
            datatype, found = _OUTPUTS[wanted.name], values[wanted.name]
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
        answer: dict[str, Any] = {"model_name": self.model, "model_version": _VERSION}
        if asked.id:
            answer["id"] = asked.id
        head = json.dumps(answer | {"outputs": outputs}, ensure_ascii=False).encode()
        if binary:
            self.set_header(_LENGTH, str(len(head)))
            self.set_header("Content-Type", "application/octet-stream")
        else:
            self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(b"".join([head, *binary]))


def _values(asked: InferRequest, parts: Parts, binary: bytes) -> dict[str, list[Any]]:
    """Of each tensor, by name. Raises InvalidRequest."""
    if asked.outputs and (unknown := {o.name for o in asked.outputs} - _OUTPUTS.keys()):
        raise InvalidRequest(
            f"unknown output {shown(min(unknown))}: there are {', '.join(_OUTPUTS)}"
        )
    values: dict[str, list[Any]] = {}
    at = 0
    for tensor in asked.inputs:
        if tensor.datatype != _INPUTS.get(tensor.name, tensor.datatype):
            raise InvalidRequest(
                f"{tensor.name} must be {_INPUTS[tensor.name]}, not {shown(tensor.datatype)}"
            )
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            found = list(_flat(tensor.data or []))
            values[tensor.name] = _images(found, parts) if tensor.name == "IMAGE" else found
        elif isinstance(size, int) and 0 <= size <= len(binary) - at:
            values[tensor.name] = unpacked(tensor, binary[at : at + size])
            at += size
        else:
            raise InvalidRequest(f"the data of {shown(tensor.name)} is not all there")
    if at < len(binary):
        raise InvalidRequest(f"there are {len(binary) - at} bytes that no input holds")
    return values


def _images(places: list[Any], parts: Parts) -> list[bytes]:
    """Those that were sent in base64, of which their numbers are left. Raises InvalidRequest."""
    if any(not isinstance(n, int) or not 0 <= n < len(parts.images) for n in places):
        raise InvalidRequest("IMAGE must hold strings in base64, or binary data")
    return [parts.images[number] for number in places]


def _flat(data: list[Any]) -> Any:
    for each in data:
        if isinstance(each, list):
            yield from _flat(each)
        else:
            yield each
