"""POST /caption: an image in, its caption out."""

import asyncio
import re
import time
from contextlib import aclosing

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Caption, GenerationRequest
from runtime.results import make_caption
from server.http.answers import CaptionAnswer, ErrorAnswer, ErrorDetail
from server.http.forms import (
    FORM,
    JSON,
    URLENCODED,
    VIDEO,
    ParsedRequest,
    check_media_type,
    parsed,
    query_fields,
)
from server.http.handler import as_json
from server.http.intake import EVENTS, IntakeHandler
from server.images import clips
from server.images.clips import Clip
from server.protocols.errors import SERVER_FAULTS, answer_to
from server.protocols.streams import text_deltas
from server.requests.fields import CaptionFields
from server.requests.multipart_body import media_type, read_form
from server.requests.parts import Parts
from server.service.model import Model
from server.service.service import Images
from server.tasks import gather_or_cancel

_MOST_LOGPROBS = 160  # images times n times logprobs of a request with several images
_PAGE = 8 * 1024  # characters of an answer charged as one page
_ACCEPT = 1000  # characters of the Accept header that are parsed
_WEIGHT = re.compile(r"[01](\.[0-9]{0,3})?")


class CaptionHandler(IntakeHandler):
    """Accepts the image as a raw body, as a multipart form or as base64 in JSON."""

    def check_head(self) -> None:
        """Raises InvalidRequest or UnsupportedMediaType."""
        self._kind, self._boundary = media_type(self.request.headers.get("Content-Type", ""))
        check_media_type(self._kind)

    async def serve(self, body: bytes) -> None:
        """Answer with the caption as JSON, or as plain text for `Accept: text/plain`."""
        started = time.perf_counter()
        wanted = parsed(await self._parts(body), query_fields(self.request))
        del body
        fields = wanted.fields
        model = self.service.model(fields.model)
        self.model_name = model.name
        accept = self.request.headers.get("Accept", "")[:_ACCEPT]
        streams = fields.stream or EVENTS in accept
        _check_clip(model, wanted)
        if wanted.is_list(model.manifest.sizes.frames):
            await self._several(model, wanted, streams, started)
            return
        images = wanted.alone
        request = model.request(
            fields.prompt, fields.sampling, fields.priority, fields.timeout_ms, streams
        )
        if streams:
            await self._stream(model, request, images, started)
            return
        caption = await self.service.caption(model, request, images, self.client)
        answer = self._answer(model, caption, started)
        if _prefers_text(accept):
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(caption.text + "\n")
        else:
            await self._finish(as_json(answer))

    async def _several(
        self, model: Model, wanted: ParsedRequest, streams: bool, started: float
    ) -> None:
        """Answer with a list that has a caption or an error for each image."""
        if streams or model.manifest.sizes.frames:
            raise InvalidRequest("several images go without stream, and with models of one image")
        told = len(wanted.images) * (wanted.fields.n or 1) * (wanted.fields.logprobs or 0)
        if told > _MOST_LOGPROBS:
            raise InvalidRequest(
                f"images times n times logprobs is {told}: {_MOST_LOGPROBS} at most are told"
            )
        self.take_places(len(wanted.images) - 1)  # the first took its place in `prepare`
        prompts = wanted.prompts or [None] * len(wanted.images)
        results = await gather_or_cancel(
            self._one(model, wanted.fields, image, prompt, started)
            for image, prompt in zip(wanted.images, prompts, strict=True)
        )
        errors = [result.error.code for result in results if isinstance(result, ErrorAnswer)]
        if ours := [code for code in errors if code in SERVER_FAULTS]:
            self.code = ours[0]  # it counts as that, even if other images have captions
        elif len(errors) == len(results):
            self.code = errors[0]
        await self.held_back(self.service.rates.refusals.spend(self.client, len(errors)))
        texts = []
        for result in results:
            texts.append(as_json(result))
            await asyncio.sleep(0)
        await self._finish(f'{{"results": [{", ".join(texts)}]}}')

    async def _finish(self, text: str) -> None:
        """Answer with JSON; a long answer is charged as several pages."""
        if pages := len(text) // _PAGE:
            await self.paced(pages)
        self.finish_json(text)

    async def _one(
        self,
        model: Model,
        fields: CaptionFields,
        image: bytes | str,
        prompt: str | None,
        started: float,
    ) -> CaptionAnswer | ErrorAnswer:
        images: Images = image if isinstance(image, str) else [image]
        try:
            if not image:
                raise InvalidRequest("the image is empty: send a whole file")
            request = model.request(
                prompt or fields.prompt, fields.sampling, fields.priority, fields.timeout_ms
            )
            caption = await self.service.caption(model, request, images, self.client)
        except VignetteError as error:
            self.log_exception(type(error), error, error.__traceback__)
            answer = answer_to(error)
            return ErrorAnswer(ErrorDetail(answer.code, answer.message or str(error)))
        return self._answer(model, caption, started)

    async def _stream(
        self, model: Model, request: GenerationRequest, images: Images, started: float
    ) -> None:
        """Answer with an event for each token, then one that holds the whole JSON answer."""
        try:
            async with aclosing(
                self.service.generate(model, request, images, self.client)
            ) as outputs:
                async for news in text_deltas(outputs, model.tokenizer):
                    if news.completion.token_ids:
                        self.send({"text": news.text, "tokens": news.tokens}, "token")
            assert news.whole is not None
            caption = make_caption(request, news.whole, model.tokenizer)
            self.send(self._answer(model, caption, started), "caption")
        except VignetteError as error:
            if not self.streams:
                raise
            self.send(self.failed(error), "error")
        self.finish()

    def _answer(self, model: Model, caption: Caption, started: float) -> CaptionAnswer:
        seconds = time.perf_counter() - started
        answer = CaptionAnswer.of(caption, model, seconds)
        self.timing = caption.timing
        return answer

    async def _parts(self, body: bytes) -> Parts:
        """Parse the body, in pieces or in another process, so as not to block the event loop."""
        if not body:
            raise InvalidRequest("the body is empty: send an image")
        if self._kind == FORM:
            self.hold(len(body))  # the images are copied out of it
            parts = Parts()
            for _ in read_form(body, self._boundary, parts):
                await asyncio.sleep(0)
            return parts
        if self._kind == JSON:
            return await self.json_parts(body)
        if self._kind == URLENCODED and body.startswith(b"image="):
            raise InvalidRequest(
                "this is an urlencoded form: send the file itself (curl --data-binary @FILE), "
                "or a multipart form (curl -F image=@FILE)"
            )
        if self._kind.startswith(VIDEO):
            return Parts(video=body)
        return Parts(images=[body])


def _check_clip(model: Model, wanted: ParsedRequest) -> None:
    """Raise InvalidRequest or NoVideo for a clip that this model or server does not accept."""
    clip = next((each for each in wanted.images if isinstance(each, Clip)), None)
    if clip is None:
        return
    if not clip:
        raise InvalidRequest("the clip is empty: send a whole file")
    if not model.manifest.sizes.frames and not wanted.fields.first_frame:
        raise InvalidRequest(
            "this model takes one image: ask for a clip's first frame with first_frame=true, or "
            "use a video checkpoint"
        )
    clips.check(clip)


def _prefers_text(accept: str) -> bool:
    """Whether Accept names text/plain with more weight than JSON (RFC 9110, 12.5.1)."""
    weights: dict[str, float] = {}
    for place, part in enumerate(accept.split(",")):
        kind, *parameters = (p.strip().lower() for p in part.split(";"))
        weight = next((p.removeprefix("q=") for p in parameters if p.startswith("q=")), "1")
        # Of equal weights the first listed wins.
        weights[kind] = float(weight) - place * 1e-6 if _WEIGHT.fullmatch(weight) else 0
    json_weight = max(weights.get(k, 0) for k in ("application/json", "application/*", "*/*"))
    return weights.get("text/plain", 0) > max(json_weight, 0)
