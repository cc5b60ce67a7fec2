"""POST /caption: an image in, its caption out."""

import asyncio
import re
import time

from runtime.errors import InvalidRequest
from server.http.bodies import PIECE, Parts, json_parts, media_type, read_form
from server.http.forms import FORM, JSON, URLENCODED, asked, check_media_type, query_fields
from server.http.intake import IntakeHandler
from server.http.schemas import CaptionAnswer
from server.ipc.dispatcher import Expired

_ACCEPT = 1000  # characters of that header that are looked at
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")


class CaptionHandler(IntakeHandler):
    """Takes the image as raw body, as multipart form or as base64 in JSON."""

    def check_head(self) -> None:
        """Raises InvalidRequest or UnsupportedMediaType."""
        self._kind, self._boundary = media_type(self.request.headers.get("Content-Type", ""))
        check_media_type(self._kind)

    async def serve(self, body: bytes) -> None:
        """Answer with the caption, as JSON or, for `Accept: text/plain`, as it is."""
        started = time.perf_counter()
        fields, images = asked(await self._parts(body), query_fields(self.request))
        del body
        model = self.service.model(fields.model)
        self.model = model.name
        request = model.request(
            fields.prompt, fields.max_new_tokens, fields.timeout_ms, fields.priority
        )
        caption = await self.service.caption(model, request, images, self.client)
        answer = CaptionAnswer.of(caption, model.name, time.perf_counter() - started)
        self.seconds = {stage: ms / 1e3 for stage, ms in answer.timing_ms}
        if _prefers_text(self.request.headers.get("Accept", "")):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(caption.text + "\n")
        else:
            self.write_json(answer.model_dump())

    async def _parts(self, body: bytes) -> Parts:
        """The body taken apart, in pieces or by another process."""
        if not body:
            raise InvalidRequest("the body is empty: send an image")
        if self._kind in (JSON, FORM):
            self.hold(len(body))  # the images are copied from it
        if self._kind == FORM:
            parts = Parts()
            for _ in read_form(body, self._boundary, parts):
                await asyncio.sleep(0)
            return parts
        if self._kind == JSON:
            return json_parts(body) if len(body) <= PIECE else await self._large_parts(body)
        if self._kind == URLENCODED and body.startswith(b"image="):
            raise InvalidRequest(
                "this is an urlencoded form: send the file itself (curl --data-binary @FILE), "
                "or a multipart form (curl -F image=@FILE)"
            )
        return Parts(images=[body])

    async def _large_parts(self, body: bytes) -> Parts:
        """Expired after the usual deadline, because the request's own may stand in the body."""
        try:
            async with asyncio.timeout(self.service.settings.timeout_seconds):
                return await self.service.decoders.parts(body, self.client)
        except TimeoutError:
            raise Expired("the deadline passed before the body was read") from None


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
