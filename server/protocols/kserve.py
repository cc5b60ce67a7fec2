"""The Open Inference Protocol (KServe v2) for captions, shared by HTTP and gRPC.

The input IMAGE holds one or several encoded images, each captioned by itself; for a video model the
frames of one or several clips.
https://github.com/kserve/open-inference-protocol
"""

import asyncio
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime import __version__
from runtime.errors import InvalidRequest
from runtime.request import Caption
from server.requests.fields import CaptionFields, checked
from server.requests.parts import MOST_IMAGES, shown
from server.service.model import Model
from server.service.service import Service, UnknownModel
from server.tasks import gather_or_cancel

SERVER = {"name": "vignette", "version": __version__}
VERSION = "1"  # of each model
PLATFORM = "onnxruntime_git"
INPUTS = {"IMAGE": "BYTES", "PROMPT": "BYTES", "MAX_NEW_TOKENS": "INT32", "NUM_BEAMS": "INT32"}
OUTPUTS = {"CAPTION": "BYTES", "SCORE": "FP32"}
NUMBERS = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32}
MOST_AXES = 8  # of a tensor: multiplying more of them takes long
SIZE = 4  # bytes of the length before each element of a BYTES tensor
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "INT32": "TYPE_INT32", "FP32": "TYPE_FP32"}
EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "statistics")


def model_of(service: Service, name: str, version: str | None) -> Model:
    """The model of that name, or the default. version: none, or empty, for any. Raises
    UnknownModel.
    """
    if version not in (None, "", VERSION):
        raise UnknownModel(f"there is no such version here: ask for {VERSION}, or for none")
    return service.model(name)


def check_input(name: str, datatype: str, before: Container[str]) -> None:
    """Raise InvalidRequest for an unknown or repeated input, or a wrong datatype.

    before: names of the inputs before it.
    """
    if name in before:
        raise InvalidRequest(f"the input {name} is given twice: send it once")
    if name not in INPUTS:
        raise InvalidRequest(f"unknown input {shown(name)}: there are {', '.join(INPUTS)}")
    if datatype != INPUTS[name]:
        raise InvalidRequest(f"{name} must be {INPUTS[name]}, not {shown(datatype)}")


def check_outputs(names: Sequence[str]) -> None:
    """Raise InvalidRequest for unknown or repeated outputs."""
    if len(set(names)) < len(names):
        raise InvalidRequest("an output is asked for twice")
    if unknown := set(names) - OUTPUTS.keys():
        raise InvalidRequest(
            f"unknown output {shown(min(unknown))}: there are {', '.join(OUTPUTS)}"
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs of a call: images, or a clip's frames, of each request, a prompt or None for each, and
    fields of SamplingParams.
    """

    images: list[list[bytes]]
    prompts: list[str | None]
    sampling: dict[str, Any]

    @classmethod
    def of(cls, tensors: dict[str, list[Any]], frames: int | None) -> "Inputs":
        """Build from tensor values by name. frames: of a clip, for a video model. Raises
        InvalidRequest.
        """
        sent, each = tensors.get("IMAGE", []), frames or 1
        if not 0 < len(sent) <= MOST_IMAGES:
            raise InvalidRequest(f"IMAGE must hold 1 to {MOST_IMAGES} encoded images")
        if len(sent) % each:
            raise InvalidRequest(
                f"IMAGE holds {len(sent)} images, and this model takes {each} frames of a clip "
                "each: send as many as encoded images, or the clip itself to POST /caption"
            )
        images = [sent[first : first + each] for first in range(0, len(sent), each)]
        prompts: list[str | None] = [_text(prompt) for prompt in tensors.get("PROMPT", [])]
        prompts = prompts or [None]
        if len(prompts) not in (1, len(images)):
            raise InvalidRequest("PROMPT must hold one prompt, or one for each image or clip")
        asked = {}
        for name in ("MAX_NEW_TOKENS", "NUM_BEAMS"):
            if values := tensors.get(name):
                if len(values) != 1:
                    raise InvalidRequest(f"{name} must hold one number")
                asked[name.lower()] = values[0]
        several = prompts if len(prompts) == len(images) else prompts * len(images)
        return cls(images, several, checked(CaptionFields, asked).sampling)

    async def captions(
        self, service: Service, model: Model, client: str, timeout_ms: int | None = None
    ) -> list[Caption]:
        """Caption all images concurrently; the first error cancels the others."""
        requests = []
        for prompt in self.prompts:
            requests.append(model.request(prompt, self.sampling, timeout_ms=timeout_ms))
            await asyncio.sleep(0)  # tokenizing a prompt may take a while
        each = zip(requests, self.images, strict=True)
        return await gather_or_cancel(
            service.caption(model, request, images, client) for request, images in each
        )


def _text(prompt: object) -> str:
    if not isinstance(prompt, str | bytes):
        raise InvalidRequest("PROMPT must hold text")
    try:
        return prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as cause:
        raise InvalidRequest("PROMPT is not UTF-8") from cause


def check_shape(
    name: str, shape: Sequence[int], values: list[Any], frames: int | None = None
) -> None:
    """Raise InvalidRequest for a shape of too many axes, of another number of values, or of clips
    of another number of frames than a video model takes.
    """
    if len(shape) > MOST_AXES:
        raise InvalidRequest(f"{shown(name)} has {len(shape)} axes: use one")
    if any(length < 0 for length in shape):
        raise InvalidRequest(f"{shown(name)} has an axis of negative length")
    longer = [length for length in shape if length != 1]
    if name == "IMAGE" and frames and len(longer) > 1 and longer[-1] != frames:
        raise InvalidRequest(
            f"IMAGE's last axis does not hold the {frames} frames that this model takes of a clip: "
            f"its shape is [N, {frames}], or one axis of all frames"
        )
    if len(values) <= MOST_IMAGES and math.prod(shape) != len(values):  # more are refused later
        raise InvalidRequest(f"{shown(name)} has {len(values)} values, unlike its shape tells")


def unpacked(name: str, datatype: str, data: bytes) -> list[Any]:
    """Decode the values of a tensor. Raises InvalidRequest."""
    if datatype in NUMBERS:
        kind = np.dtype(NUMBERS[datatype])
        if len(data) > MOST_IMAGES * kind.itemsize:
            raise InvalidRequest(f"{shown(name)} holds too many numbers")
        if len(data) % kind.itemsize:
            raise InvalidRequest(f"{shown(name)} holds a part of a number")
        return np.frombuffer(data, kind.newbyteorder("<")).tolist()
    values: list[Any] = []
    at = 0
    while at < len(data) and len(values) <= MOST_IMAGES:
        end = at + SIZE + int.from_bytes(data[at : at + SIZE], "little")
        if at + SIZE > len(data) or end > len(data):
            raise InvalidRequest(f"{shown(name)} ends within an element")
        values.append(data[at + SIZE : end])
        at = end
    return values


def packed(values: list[Any], datatype: str) -> bytes:
    """Encode the values of a tensor."""
    if datatype in NUMBERS:
        return np.array(values, NUMBERS[datatype]).tobytes()
    texts = [value.encode() for value in values]
    return b"".join(len(text).to_bytes(SIZE, "little") + text for text in texts)


def metadata(model: Model) -> dict[str, Any]:
    """Metadata of a model: its inputs and outputs."""

    def tensors(kinds: dict[str, str]) -> list[dict[str, Any]]:
        return [{"name": n, "datatype": kind, "shape": [-1]} for n, kind in kinds.items()]

    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": tensors(INPUTS),
        "outputs": tensors(OUTPUTS),
    }


def index_entry(model: Model) -> dict[str, str]:
    """A model's entry in the repository index."""
    return {
        "name": model.name,
        "version": VERSION,
        "state": "READY" if model.serves else "UNAVAILABLE",
        "reason": "" if model.serves else model.status,
    }


def config(model: Model) -> dict[str, Any]:
    """A model in the format of Triton's model configuration."""

    def tensors(kinds: dict[str, str], **more: Any) -> list[dict[str, Any]]:
        return [
            {"name": n, "data_type": CONFIG_TYPES[kind], "dims": [-1]}
            | (more if n != "IMAGE" else {})
            for n, kind in kinds.items()
        ]

    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": 0,
        "input": tensors(INPUTS, optional=True),
        "output": tensors(OUTPUTS),
    }
