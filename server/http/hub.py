"""POST /: the endpoint of `huggingface_hub.InferenceClient` for image-to-text and visual question
answering.
"""

from math import exp
from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.errors import InvalidRequest
from server.http.forms import JSON, check_media_type
from server.http.intake import IntakeHandler
from server.http.pages import Page
from server.protocols.errors import ErrorStatus
from server.requests.fields import SAMPLING, CaptionFields, checked
from server.requests.multipart_body import media_type
from server.requests.parts import shown


class Question(BaseModel):
    """A question about an image. image: its index among the body's images."""

    model_config = ConfigDict(extra="forbid")

    image: int | None = None
    question: str


class Parameters(BaseModel):
    """Parameters of a task. top_k: ignored, as answers are not ranked. generation_parameters:
    named as in `generate`.
    """

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = None
    top_k: int | None = None
    generation_parameters: dict[str, Any] | None = None


class HubRequest(BaseModel):
    """inputs: an image, by its index among the body's images, or a question about one. image: the
    same image again, as the hub's client sends it beside a question.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: int | Question
    image: int | None = None
    question: str | None = None
    parameters: Parameters | None = None

    @property
    def asks(self) -> str | None:
        """The question, from either field that may hold it."""
        return self.inputs.question if isinstance(self.inputs, Question) else self.question

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams. Raises InvalidRequest."""
        given = self.parameters or Parameters()
        asked = dict(given.generation_parameters or {})
        draws = asked.pop("do_sample", None)
        if not isinstance(draws, bool | None):
            raise InvalidRequest("do_sample must be true or false")
        if draws:
            asked.setdefault("temperature", 1.0)
        else:  # like `generate`, which samples only if told to
            asked = {k: v for k, v in asked.items() if k not in ("temperature", "top_k", "top_p")}
        if given.max_new_tokens is not None:
            asked["max_new_tokens"] = given.max_new_tokens
        if unknown := sorted(asked.keys() - SAMPLING):
            raise InvalidRequest(
                f"unknown parameter {shown(unknown[0])}: there are {', '.join(sorted(SAMPLING))}"
            )
        return checked(CaptionFields, asked).sampling


class HubHandler(Page, IntakeHandler):
    """Accepts an image as a raw body or in JSON; GET serves the demo page."""

    def shown_error(self, answer: ErrorStatus, message: str) -> Any:
        """The error in the hub client's format."""
        return {"error": message, "error_type": answer.code}

    def check_head(self) -> None:
        """Raises InvalidRequest or UnsupportedMediaType."""
        self._kind, _ = media_type(self.request.headers.get("Content-Type", ""))
        check_media_type(self._kind)

    async def serve(self, body: bytes) -> None:
        """Answer with the captions, or with answers and their mean token probabilities."""
        if not body:
            raise InvalidRequest("the body is empty: send an image")
        images, asked = [body], HubRequest(inputs=0)
        if self._kind == JSON:
            parts = await self.json_parts(body)
            asked, images = checked(HubRequest, parts.fields), list(dict.fromkeys(parts.images))
        if len(images) != 1:
            raise InvalidRequest(f"the body has {len(images)} images: send one, in inputs")
        model = self.service.model()
        self.model_name = model.name
        request = model.request(asked.asks, asked.sampling)
        caption = await self.service.caption(model, request, images, self.client)
        self.timing = caption.timing
        captions = (caption, *caption.others)
        if asked.asks is None:
            self.write_json([{"generated_text": each.text} for each in captions])
        else:
            self.write_json(
                [{"answer": each.text, "score": exp(each.score or 0)} for each in captions]
            )
