"""The part of OpenAI's API that captioning needs: models, and chat with an image in it.

The text of the user's message is the prompt. https://platform.openai.com/docs/api-reference/chat
"""

import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Caption, FinishReason, GenerationRequest, RequestOutput
from runtime.results import join_outputs, make_caption
from server.http.answers import ModelAnswer, ModelsAnswer, Usage
from server.http.forms import JSON
from server.http.handler import Handler
from server.http.intake import IntakeHandler
from server.protocols.errors import ErrorStatus, UnsupportedMediaType
from server.protocols.streams import text_deltas
from server.requests.fields import checked
from server.requests.multipart_body import media_type
from server.requests.parts import shown
from server.service.model import Model
from server.service.service import Images

_KINDS = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values of other options that ask for nothing
    "response_format": ({"type": "text"},), "store": (False,), "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"), "tool_choice": ("none", "auto"), "modalities": (["text"],),
}  # fmt: skip
_DONE = "data: [DONE]\n\n"


class TextPart(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(BaseModel):
    """url: the image's URL, or a data URL (which parsing replaces by an index)."""

    url: str | int
    detail: str | None = None


class ImagePart(BaseModel):
    """An image part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(BaseModel):
    """A chat message; send exactly one, the user's."""

    role: str
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=64, fail_fast=True),
        ]
    )
    name: str | None = None


class StreamOptions(BaseModel):
    """Extras of a stream besides its tokens."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat request; options that mean nothing for captions must be absent or neutral."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=64, fail_fast=True)]
    max_tokens: Annotated[
        int | None, Field(ge=1, le=10**9, description="Deprecated: max_completion_tokens.")
    ] = None
    max_completion_tokens: Annotated[
        int | None,
        Field(ge=1, le=10**9, description="An upper bound, as is what the model has room for."),
    ] = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in fields.items()
            if value not in (None, [], {}, *_NEUTRAL.get(name, ()))
        }

    def sampling(self, most_new_tokens: int) -> dict[str, Any]:
        """Fields of SamplingParams; temperature, top_p and seed only when sampling.

        most_new_tokens: that there is room for. Clients of large models ask for hundreds.
        """
        most = self.max_completion_tokens or self.max_tokens
        asked: dict[str, Any] = {
            "max_new_tokens": most and max(1, min(most, most_new_tokens)),
            "n": self.n,
            "logprobs": max(1, self.top_logprobs or 0) if self.logprobs else None,
        }
        if self.temperature:
            drawing = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
            asked |= {name: value for name, value in drawing.items() if value is not None}
        return asked

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def asked(self, images: list[bytes]) -> tuple[str | None, Images]:
        """The prompt, and the images or the URL of one. Raises InvalidRequest."""
        if [message.role for message in self.messages] != ["user"]:
            raise InvalidRequest("send one message, the user's: GIT knows no others")
        content = self.messages[0].content
        parts = [] if isinstance(content, str) else content
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        addresses = [url for url in urls if isinstance(url, str)]
        if not urls:
            raise InvalidRequest("there is no image: send it as a part of type image_url")
        if addresses and len(urls) > 1:
            raise InvalidRequest("of several images each must be sent itself, as a data URL")
        return " ".join(texts) or None, addresses[0] if addresses else images


class ModelsHandler(Handler):
    """GET /v1/models: the server's models."""

    async def get(self) -> None:
        """OpenAI's model list, with what each model's captions depend on."""
        await self.paced()
        self.write_json(ModelsAnswer([ModelAnswer.of(m) for m in self.service.models.values()]))


class ModelHandler(Handler):
    """GET /v1/models/NAME: one of them."""

    async def get(self, name: str) -> None:
        """An entry of OpenAI's list. Raises UnknownModel."""
        await self.paced()
        self.write_json(ModelAnswer.of(self.service.model(name)))


class ChatHandler(IntakeHandler):
    """POST /v1/chat/completions: an image, and perhaps a question about it."""

    def shown_error(self, answer: ErrorStatus, message: str) -> Any:
        """OpenAI's error body."""
        kind = _KINDS.get(answer.status)
        kind = kind or ("server_error" if answer.status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": answer.code}}

    def check_head(self) -> None:
        """Raises InvalidRequest or UnsupportedMediaType."""
        kind, _ = media_type(self.request.headers.get("Content-Type", ""))
        if kind != JSON:
            raise UnsupportedMediaType(f"Content-Type {shown(kind)} is not taken here: send {JSON}")

    async def serve(self, body: bytes) -> None:
        """Answer with a completion, or stream it."""
        parts = await self.json_parts(body)
        asked = checked(ChatRequest, parts.fields)
        prompt, images = asked.asked(parts.images)
        model = self.service.model(asked.model)
        self.model_name = model.name
        room = model.limits.most_new_tokens(model.tokenizer.prompt_ids(prompt))
        request = model.request(prompt, asked.sampling(room), stream=asked.stream)
        completion = _Completion(self, asked, model, request)
        async with aclosing(self.service.generate(model, request, images, self.client)) as outputs:
            if asked.stream:
                await completion.stream(outputs)
            else:
                self.write_json(completion.whole(join_outputs([each async for each in outputs])))


class _Completion:
    """A caption as an OpenAI chat completion."""

    def __init__(
        self, handler: ChatHandler, asked: ChatRequest, model: Model, request: GenerationRequest
    ) -> None:
        self._handler, self._asked, self._model, self._request = handler, asked, model, request
        self._common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.identity,
        }

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The whole completion, not streamed."""
        caption = make_caption(self._request, output, self._model.tokenizer)
        self._handler.timing = caption.timing
        captions = (caption, *caption.others)
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [self._choice(index, each) for index, each in enumerate(captions)],
            "usage": self._usage(sum(each.completion_tokens for each in captions)),
        }

    def _choice(self, index: int, caption: Caption) -> dict[str, Any]:
        text, stopped = self._stopped(caption.text)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "finish_reason": "stop" if stopped else _reason(caption.finish_reason),
            "logprobs": self._logprobs(caption.token_ids, caption.logprobs, caption.top_logprobs),
        }

    def _stopped(self, text: str) -> tuple[str, bool]:
        """The text up to its first stop string, and whether it has one."""
        ends = [at for stop in self._asked.stops if stop and (at := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)

    def _held_back(self, text: str) -> int:
        """How many characters at the end of the text may begin a stop string."""
        begun = 0
        for stop in self._asked.stops:
            for length in range(1, min(len(stop), len(text) + 1)):
                if text.endswith(stop[:length]):
                    begun = max(begun, length)
        return begun

    def _usage(self, completion_tokens: int) -> Usage:
        return Usage.of(len(self._request.prompt_ids) - 1, completion_tokens)

    def _logprobs(self, tokens: Any, logprobs: Any, tops: Any) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        shown_tops = self._asked.top_logprobs or 0
        content = [
            self._logprob(token, logprob)
            | {"top_logprobs": [self._logprob(*each) for each in top[:shown_tops]]}
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._model.tokenizer.token(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    async def stream(self, outputs: AsyncIterator[RequestOutput]) -> None:
        """Send chunks of whole words as they come; an error after the first is an event, too."""
        said, stopped = "", False
        try:
            async for news in text_deltas(outputs, self._model.tokenizer):
                if not self._handler.streams and news.completion.token_ids:
                    self._chunk({"role": "assistant", "content": ""})
                text, stopped = self._stopped(news.text)
                if not stopped and news.whole is None:
                    text = text[: len(text) - self._held_back(text)]
                completion = news.completion
                logprobs = self._logprobs(
                    completion.token_ids, completion.logprobs, completion.top_logprobs
                )
                if text[len(said) :] or logprobs:
                    self._chunk({"content": text[len(said) :]}, logprobs=logprobs)
                said = text
                if stopped or news.whole is not None:
                    break
            ended = None if news.whole is None else news.whole.finish_reason
            if news.whole is not None and news.whole.timing is not None:
                self._handler.timing = news.whole.timing
            self._chunk({}, "stop" if stopped else _reason(ended))
            if self._asked.stream_options and self._asked.stream_options.include_usage:
                usage = self._usage(news.tokens - (ended is FinishReason.STOP))
                self._send({**self._common, "choices": [], "usage": usage})
        except VignetteError as error:
            if not self._handler.streams:
                raise
            self._send(self._handler.failed(error))
        self._handler.write(_DONE)
        self._handler.finish()

    def _chunk(
        self,
        delta: dict[str, Any],
        reason: str | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": logprobs}
        self._send({**self._common, "choices": [choice]})

    def _send(self, content: dict[str, Any]) -> None:
        if "choices" in content:
            content["object"] = "chat.completion.chunk"
        self._handler.send(content)


def _reason(reason: FinishReason | None) -> str:
    return "length" if reason is FinishReason.LENGTH else "stop"
