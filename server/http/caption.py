"""POST /caption: an image in, its caption out."""

import asyncio
import re
import time
from collections.abc import Awaitable
from contextlib import ExitStack, aclosing

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Caption, captioned, joined
from server.http.bodies import PIECE, Parts, json_parts, media_type, read_form, shown
from server.http.errors import BodyTooLarge, UnsupportedMediaType
from server.http.forms import (
    FORM,
    JSON,
    URLENCODED,
    CaptionRequest,
    asked,
    check_media_type,
    query_fields,
)
from server.http.handler import Handler
from server.ipc.dispatcher import Expired
from server.service.service import Service

_DRAINED = 20  # times the body limit
_FREE = 256 * 1024  # bytes of each body that are not paced: most images are no larger
_STEP_SECONDS = 0.02  # shorter waits are put off
_WHOLE, _LENGTH = re.compile(r"[0-9]+"), re.compile(r"[0-9]{1,15}")  # of a Content-Length
_ACCEPT = 1000  # characters of that header that are looked at
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")


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
        self._payer = self.client  # for the bytes of the body
        self._refused: VignetteError | None = None
        self._place = ExitStack()  # among the requests of its key

    def prepare(self) -> None:
        """Refuse what can be refused by its head, before anything of the body is kept or read.

        A client that is still sending would lose an early answer with its connection, so the body
        is read and dropped first, unless the client waits for the answer, or sends far too much.
        """
        super().prepare()
        if self.request.method == "OPTIONS":
            return
        most = _DRAINED * self._limit
        self.request.connection.set_max_body_size(most + PIECE)  # type: ignore[union-attr]
        declared = self.request.headers.get("Content-Length", "0")
        length = int(declared) if _LENGTH.fullmatch(declared) else most + 1
        try:
            if not _WHOLE.fullmatch(declared):
                raise InvalidRequest(f"Content-Length {shown(declared)} is no number")
            if self.service.keys is not None:
                self.key = self._place.enter_context(self.service.keys.enter(self._key()))
            self._payer = self.client
            self._kind, self._boundary = media_type(self.request.headers.get("Content-Type", ""))
            check_media_type(self._kind)
            encoding = self.request.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise UnsupportedMediaType(
                    f"Content-Encoding {shown(encoding)} is not taken: send the body as it is"
                )
            if length > self._limit:
                raise self._too_large()
        except VignetteError as error:
            waits = self.request.headers.get("Expect", "").lower() == "100-continue"
            if waits or length > most:
                self._refuse_now(error)
            else:
                self._refused = error

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Gather the body; a chunked one tells its length only as it comes."""
        if self._finished:
            return None
        self._received += len(chunk)
        if self._received > _DRAINED * self._limit:
            self._refuse_now(self._refused or self._too_large())
            return None
        if self._refused is None:
            try:
                if self._received > self._limit:
                    raise self._too_large()
                self._hold(len(chunk))
            except VignetteError as error:
                self._refused = error
                self._drop_body()
            else:
                self._body += chunk
        if self._received <= _FREE:
            return None
        wait = self.service.intake.spend(self.client, len(chunk))
        return asyncio.sleep(wait) if wait > _STEP_SECONDS else None

    def _hold(self, size: int) -> None:
        """Count bytes of this request among those inside. Raises QueueFull."""
        self.service.admission.hold(size, self._payer)
        self._held += size

    def _drop_body(self) -> None:
        self._body = bytearray()
        if self._held:
            self.service.admission.let_go(self._held, self._payer)
        self._held = 0

    def _refuse_now(self, error: VignetteError) -> None:
        """Answer, and close, with the body still coming."""
        self._refused = error  # should the rest of the body be here before the answer is due
        self._drop_body()
        self.send_error(exc_info=(type(error), error, None))

    def _too_large(self) -> BodyTooLarge:
        limit = f"{self._limit / 1e6:g} MB"
        return BodyTooLarge(f"the body is larger than {limit}: send a smaller image")

    async def post(self) -> None:
        """Answer with the caption, as JSON or, for `Accept: text/plain`, as it is."""
        if self._finished:
            return
        if self._refused is not None:
            refused, self._refused = self._refused, None  # or its frames would hold this for long
            raise refused
        self._task = asyncio.current_task()
        started = time.perf_counter()
        with (
            self.service.admission.enter(self.client),
            self.service.metrics.inside.track_inprogress(),
        ):
            asked = await self._asked()
            caption = await self._caption(asked)
        timing = caption.timing
        seconds = {
            "queue": timing.queue_s,
            "preprocess": timing.preprocess_s,
            "encode": timing.encode_s,
            "decode": timing.decode_s,
            "total": time.perf_counter() - started,
        }
        for stage, value in seconds.items():
            if value:  # else it was gone through for an earlier request: the caption was known
                self.service.metrics.stage.labels(stage).observe(value)
        self._seconds = seconds
        self.service.refusals.earn(self.client, 1)
        self.outcome("ok")
        self._answer(caption, seconds)

    async def _caption(self, asked: CaptionRequest) -> Caption:
        service = self.service
        request = service.request(
            asked.prompt, asked.max_new_tokens, asked.timeout_ms, asked.priority
        )
        images = asked.image_url or asked.images
        async with aclosing(service.generate(request, images, self.client)) as outputs:
            output = joined([each async for each in outputs])
        return captioned(request, output, service.tokenizer)

    async def _asked(self) -> CaptionRequest:
        """What the request asks for. Its body is taken apart in pieces, or by another process."""
        query = query_fields(self.request)
        body = bytes(self._body)
        self._body = bytearray()
        if not body:
            raise InvalidRequest("the body is empty: send an image")
        if self._kind in (JSON, FORM):
            self._hold(len(body))  # the images are copied from it
        if self._kind == FORM:
            parts = Parts()
            for _ in read_form(body, self._boundary, parts):
                await asyncio.sleep(0)
        elif self._kind == JSON:
            short = len(body) <= PIECE
            parts = json_parts(body) if short else await self._parts(body)
        else:
            if self._kind == URLENCODED and body.startswith(b"image="):
                raise InvalidRequest(
                    "this is an urlencoded form: send the file itself (curl --data-binary @FILE), "
                    "or a multipart form (curl -F image=@FILE)"
                )
            parts = Parts(images=[body])
        return asked(parts, query)

    async def _parts(self, body: bytes) -> Parts:
        """Of a large JSON body, which another process takes apart; Expired after the usual
        deadline, because the request's own may stand in the body.
        """
        try:
            async with asyncio.timeout(self.service.settings.timeout_seconds):
                return await self.service.decoders.parts(body, self.client)
        except TimeoutError:
            raise Expired("the deadline passed before the body was read") from None

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
            if self.key is not None:
                self.service.metrics.by_key.labels(self.key, code).inc()
            if self.service.tracer is not None:
                seconds = self._seconds or {"total": self.request.request_time()}
                self.service.tracer.record(self.request.headers, code, seconds, self.name)

    def on_finish(self) -> None:
        """The bytes of the body are free again, and the place of its key."""
        self._drop_body()
        self._place.close()

    def on_connection_close(self) -> None:
        """The client has gone: take its request out of queue or batch."""
        super().on_connection_close()  # wakes those who wait for the rest of the body
        self._drop_body()
        if self._task is None or self._task.done():
            self._place.close()
        else:  # it is closed when the task has ended
            self.outcome("cancelled")
            self._gone = True
            self._task.cancel()


def _prefers_text(accept: str) -> bool:
    """Whether text/plain is asked for by name, and above JSON (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for place, part in enumerate(accept[:_ACCEPT].split(",")):
        kind, *parameters = (p.strip().lower() for p in part.split(";"))
        weight = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        # Of equal ones the first counts as wanted more.
        weights[kind] = float(weight) - place * 1e-6 if _WEIGHT.fullmatch(weight) else 0
    json_weight = max(weights.get(k, 0) for k in ("application/json", "application/*", "*/*"))
    return weights.get("text/plain", 0) > max(json_weight, 0)
