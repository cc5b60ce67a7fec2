"""POST /caption: an image in, its caption out."""

import asyncio
import contextlib
import re
import time

import tornado.web

from runtime.request import Caption
from server.admission import QueueFull
from server.errors import BodyTooLarge
from server.forms import Asked, asked
from server.handlers.base import Handler
from server.service import Service

_DRAINED = 4  # times the body limit
_CHUNK = 64 * 1024  # of a body, as Tornado reads it
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")
_LARGE = 256 * 1024  # a body that is not taken apart on the event loop


@tornado.web.stream_request_body
class CaptionHandler(Handler):
    """Takes the image as raw body, as multipart form or as base64 in JSON."""

    def initialize(self, service: Service) -> None:
        """Nothing has come in yet."""
        super().initialize(service)
        self._body = bytearray()
        self._received = self._held = 0
        self._limit = service.settings.max_body_bytes
        self._task: asyncio.Task | None = None
        self._gone = False
        self._seconds: dict[str, float] = {}
        self._full: QueueFull | None = None

    def prepare(self) -> None:
        """Refuse what says that it is too large before it is sent, if the client waits for that."""
        super().prepare()
        # Before the body comes in: strangers must not fill the memory that others need.
        if self.service.keys is not None:
            self.service.keys.check(self._key())
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
        if self._finished:
            return
        self._received += len(chunk)
        if self._received > self._limit or self._full is not None:
            self._drop_body()  # the rest is read and dropped, so that the answer arrives
            if self._received > _DRAINED * self._limit:
                self._refuse_body()
            return
        try:
            self.service.admission.hold(len(chunk))
        except QueueFull as full:
            self._full = full
            self._drop_body()
        else:
            self._held += len(chunk)
            self._body += chunk

    def _drop_body(self) -> None:
        self._body = bytearray()
        self.service.admission.let_go(self._held)
        self._held = 0

    def _refuse_body(self) -> None:
        """Answer now, and close, with the body still coming."""
        self._drop_body()
        self.send_error(413, exc_info=(BodyTooLarge, self._too_large(), None))

    def _too_large(self) -> BodyTooLarge:
        limit = f"{self._limit / 1e6:g} MB"
        return BodyTooLarge(f"the body is larger than {limit}: send a smaller image")

    async def post(self) -> None:
        """Answer with the caption, as JSON or, for `Accept: text/plain`, as it is."""
        if self._finished:
            return
        if self._received > self._limit:
            raise self._too_large()
        if self._full is not None:
            raise self._full
        self._task = asyncio.current_task()
        started = time.perf_counter()
        keys = self.service.keys
        with (
            keys.enter(self._key()) if keys else contextlib.nullcontext(),
            self.service.admission.enter(),
            self.service.metrics.inside.track_inprogress(),
        ):
            request = await self._asked()
            caption, decoding = await self.service.caption(request)
        seconds = {
            "queue": caption.queue_s,
            "preprocess": decoding,
            "encode": caption.encode_s,
            "decode": caption.decode_s,
            "total": time.perf_counter() - started,
        }
        for stage, value in seconds.items():
            if value:  # else it was gone through for an earlier request: the caption was known
                self.service.metrics.stage.labels(stage).observe(value)
        self._seconds = seconds
        self.outcome("ok")
        self._answer(caption, seconds)

    async def _asked(self) -> Asked:
        """What the body asks for; a large one is taken apart off the event loop."""
        body = bytes(self._body)
        self._body = bytearray()
        if len(body) < _LARGE:
            return asked(self.request, body)
        return await asyncio.to_thread(asked, self.request, body)

    def _key(self) -> str | None:
        scheme, _, token = self.request.headers.get("Authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else None
        return bearer or self.request.headers.get("X-API-Key")

    def _answer(self, caption: Caption, seconds: dict[str, float]) -> None:
        if _prefers_text(self.request.headers.get("Accept", "")):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(caption.text + "\n")
            return
        self.write_json(
            {
                "caption": caption.text,
                "model": self.service.manifest.model,
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
            if self.service.tracer is not None:
                seconds = self._seconds or {"total": self.request.request_time()}
                self.service.tracer.record(self.request.headers, code, seconds, self.name)

    def on_finish(self) -> None:
        """The bytes of the body are free again."""
        self._drop_body()

    def on_connection_close(self) -> None:
        """The client has gone: take its request out of queue or batch."""
        super().on_connection_close()  # wakes those who wait for the rest of the body
        self._drop_body()
        if self._task is not None and not self._task.done():
            self.outcome("cancelled")
            self._gone = True
            self._task.cancel()


def _prefers_text(accept: str) -> bool:
    """Whether text/plain is asked for by name, and above JSON (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for place, part in enumerate(accept.split(",")):
        kind, *parameters = (p.strip().lower() for p in part.split(";"))
        weight = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        # Of equal ones the first counts as wanted more.
        weights[kind] = float(weight) - place * 1e-6 if _WEIGHT.fullmatch(weight) else 0
    json_weight = max(weights.get(k, 0) for k in ("application/json", "application/*", "*/*"))
    return weights.get("text/plain", 0) > max(json_weight, 0)
