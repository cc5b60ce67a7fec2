"""POST /caption: an image in, its caption out."""

import asyncio
import base64
import binascii
import json
import time
from dataclasses import dataclass
from email.message import Message
from typing import Any

import numpy as np
import tornado.web
from tornado import httputil

from runtime.engine import Caption
from runtime.errors import InvalidRequest
from runtime.preprocess import preprocess
from server.errors import BodyTooLarge, UnsupportedMediaType
from server.handlers.base import Handler
from server.service import Service

_FIELDS = ("prompt", "max_new_tokens")
# curl --data-binary says x-www-form-urlencoded unless told otherwise; the body is the image.
_RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")

_DRAINED = 4  # times the body limit
_CHUNK = 64 * 1024  # of a body, as Tornado reads it
_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was sent: encoded images (one, or one a frame) and what to do with them."""

    images: list[bytes]
    prompt: str | None = None
    max_new_tokens: int | None = None


@tornado.web.stream_request_body
class CaptionHandler(Handler):
    """Takes the image as raw body, as multipart form or as base64 in JSON."""

    def initialize(self, service: Service) -> None:
        """Nothing has come in yet."""
        super().initialize(service)
        self._body = bytearray()
        self._received = 0
        self._limit = service.settings.max_body_bytes
        self._task: asyncio.Task | None = None
        self._gone = False

    def prepare(self) -> None:
        """Refuse what says that it is too large before it is sent, if the client waits for that."""
        # A client that is still sending would lose an early answer with its connection, so up to
        # here a body that is too large is read and dropped.
        most = _DRAINED * self._limit
        self.request.connection.set_max_body_size(most + _CHUNK)  # type: ignore[union-attr]
        declared = self.request.headers.get("Content-Length", "0")
        if declared.isdecimal() and int(declared) > self._limit:
            waits = self.request.headers.get("Expect", "").lower() == "100-continue"
            if waits or int(declared) > most:
                self._refuse_body()

    def data_received(self, chunk: bytes) -> None:
        """Gather the body; a chunked one tells its length only as it comes."""
        self._received += len(chunk)
        if self._received <= self._limit:
            self._body += chunk
            return
        self._body.clear()
        if self._received > _DRAINED * self._limit and not self._finished:
            self._refuse_body()

    def _refuse_body(self) -> None:
        """Answer now, and close, with the body still coming."""
        error = self._too_large()
        self.send_error(413, exc_info=(BodyTooLarge, error, None))

    def _too_large(self) -> BodyTooLarge:
        limit = f"{self._limit / 1e6:g} MB"
        return BodyTooLarge(f"the body is larger than {limit}: send a smaller image")

    async def post(self) -> None:
        """Answer with the caption, as JSON or, for `Accept: text/plain`, as it is."""
        if self._finished:
            return
        if self._received > self._limit:
            raise self._too_large()
        self._task = asyncio.current_task()
        started = time.perf_counter()
        with self.service.admission.enter():
            asked = self._asked()
            assert self.service.engine is not None
            # Before the image is decoded: what can never be served costs nothing.
            self.service.engine.check(asked.prompt, asked.max_new_tokens)
            pixels = await self._pixels(asked.images)
            preprocessed = time.perf_counter()
            caption = await self.service.worker.caption(pixels, asked.prompt, asked.max_new_tokens)
        seconds = {
            "queue": caption.queue_s,
            "preprocess": preprocessed - started,
            "encode": caption.encode_s,
            "decode": caption.decode_s,
            "total": time.perf_counter() - started,
        }
        for stage, value in seconds.items():
            self.service.metrics.stage.labels(stage).observe(value)
        self.outcome("ok")
        self._answer(caption, seconds)

    def _answer(self, caption: Caption, seconds: dict[str, float]) -> None:
        if _prefers_text(self.request.headers.get("Accept", "")):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(caption.text + "\n")
            return
        assert self.service.engine is not None
        self.write_json(
            {
                "caption": caption.text,
                "model": self.service.engine.manifest.model,
                "finish_reason": caption.finish_reason,
                "usage": {
                    "prompt_tokens": caption.prompt_tokens,
                    "completion_tokens": caption.completion_tokens,
                    "total_tokens": caption.prompt_tokens + caption.completion_tokens,
                },
                "timing_ms": {stage: round(value * 1e3, 2) for stage, value in seconds.items()},
            }
        )

    def outcome(self, code: str) -> None:
        """Count how the request ended; what is answered to a client that has gone is nothing."""
        if not self._gone:
            self.service.metrics.requests.labels(code).inc()

    def on_connection_close(self) -> None:
        """The client has gone: take its request out of queue or batch."""
        super().on_connection_close()  # wakes those who wait for the rest of the body
        if self._task is not None and not self._task.done():
            self.outcome("cancelled")
            self._gone = True
            self._task.cancel()

    async def _pixels(self, images: list[bytes]) -> np.ndarray:
        """Decode off the event loop -> uint8 pixels of one encoder row."""
        assert self.service.engine is not None
        how = self.service.engine.manifest.preprocessing
        frames = self.service.engine.manifest.sizes.frames
        if len(images) != (frames or 1):
            raise InvalidRequest(
                f"{len(images)} images were sent: this model takes {frames or 1} for each request"
            )
        loop = asyncio.get_running_loop()
        rows = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self.service.decoders, preprocess, image, how, self.service.settings.max_pixels
                )
                for image in images
            )
        )
        return np.stack(rows) if frames else rows[0]

    # --- the three forms of a request ---------------------------------------------------------

    def _asked(self) -> Asked:
        content_type = self.request.headers.get("Content-Type", "").lower()
        kind = content_type.partition(";")[0].strip()
        if kind not in (*_RAW_TYPES, "application/json", "multipart/form-data") and not (
            kind.startswith("image/")
        ):
            raise UnsupportedMediaType(
                f"Content-Type {kind} is not taken: send image/*, application/octet-stream, "
                "multipart/form-data or application/json"
            )
        if not self._body:
            raise InvalidRequest("the body is empty: send an image")
        if kind == "application/json":
            return self._from_json()
        if kind == "multipart/form-data":
            return self._from_form()
        fields = {name: values[-1] for name, values in self.request.query_arguments.items()}
        return _checked([bytes(self._body)], {k: _text(k, v) for k, v in fields.items()})

    def _from_json(self) -> Asked:
        try:
            fields = json.loads(self._body)
        except (ValueError, RecursionError) as cause:
            raise InvalidRequest(
                'the body is not JSON: send {"image": "<base64>"} in UTF-8'
            ) from cause
        if not isinstance(fields, dict):
            raise InvalidRequest('the JSON is not an object: send {"image": "<base64>"}')
        sent = fields.pop("image", None)
        images = sent if isinstance(sent, list) else [sent]
        return _checked([_from_base64(image) for image in images], fields)

    def _from_form(self) -> Asked:
        arguments: dict[str, list[bytes]] = dict(self.request.query_arguments)
        files: dict[str, list[httputil.HTTPFile]] = {}
        head = Message()
        head["Content-Type"] = self.request.headers["Content-Type"]
        boundary = head.get_boundary("").encode("latin-1", "replace")
        try:
            httputil.parse_multipart_form_data(boundary, bytes(self._body), arguments, files)
        except httputil.HTTPInputError as cause:
            raise InvalidRequest(
                "the multipart body can't be read: check its boundary and headers"
            ) from cause
        images = [file.body for file in files.pop("image", [])] or arguments.pop("image", [])
        if files:
            raise InvalidRequest(f"unknown file field {next(iter(files))!r}: use the field 'image'")
        if not images:
            raise InvalidRequest("the form has no field 'image': add the image under that name")
        return _checked(images, {k: _text(k, values[-1]) for k, values in arguments.items()})


def _text(field: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as cause:
        raise InvalidRequest(f"{field} is not UTF-8") from cause


def _from_base64(image: Any) -> bytes:
    if not isinstance(image, str):
        raise InvalidRequest("the field 'image' is missing or not a string: send it as base64")
    if image.startswith("data:"):
        image = image.partition(",")[2]
    try:
        return base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise InvalidRequest("the field 'image' is not base64") from cause


def _checked(images: list[bytes], fields: dict[str, Any]) -> Asked:
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise InvalidRequest(f"unknown field {unknown[0]!r}: there are {', '.join(_FIELDS)}")
    if not all(images):
        raise InvalidRequest("the image is empty: send a whole file")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str | None):
        raise InvalidRequest("prompt must be a string")
    return Asked(images, prompt, _whole_number(fields.get("max_new_tokens")))


def _whole_number(value: Any) -> int | None:
    """An int, or digits as forms send them; an empty form field is none at all."""
    if isinstance(value, str):
        value = value.strip()
        if value.isascii() and value.isdecimal() and len(value) <= _DIGITS:
            value = int(value)
    if value is None or value == "" or (isinstance(value, int) and not isinstance(value, bool)):
        return None if value == "" else value
    raise InvalidRequest("max_new_tokens must be a whole number")


def _prefers_text(accept: str) -> bool:
    """Whether text/plain is asked for by name, and above JSON (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for place, part in enumerate(accept.split(",")):
        kind, *parameters = (p.strip().lower() for p in part.split(";"))
        weight = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        # Of equal ones the first counts as wanted more.
        weights[kind] = float(weight) - place * 1e-6 if weight.replace(".", "", 1).isdigit() else 0
    json_weight = max(weights.get(k, 0) for k in ("application/json", "application/*", "*/*"))
    return weights.get("text/plain", 0) > max(json_weight, 0)
