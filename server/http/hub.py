"""POST /: what `huggingface_hub.InferenceClient` asks of an endpoint for image to text, and for
questions about an image.
"""

from math import exp
from typing import Any

from pydantic import BaseModel, ConfigDict

from runtime.errors import InvalidRequest
from server.bodies import media_type, shown
from server.errors import ErrorStatus
from server.fields import SAMPLING, CaptionFields, checked
from server.http.forms import JSON, check_media_type
from server.http.intake import IntakeHandler
from server.http.pages import Page


class Question(BaseModel):
    """What is asked about an image, which stands there by its number."""

    model_config = ConfigDict(extra="forbid")

    image: int | None = None
    question: str


class Parameters(BaseModel):
    """What a task may ask for. top_k: answers, of which there is one. generation_parameters: by the
    names of `generate`.
    """

    model_config = ConfigDict(extra="forbid")

    max_new_tokens: int | None = None
    top_k: int | None = None
    generation_parameters: dict[str, Any] | None = None


class HubRequest(BaseModel):
    """inputs: an image, which stands there by its number, or a question about one. image: the same
    again, as the hub's client sends it beside a question.
    """

    model_config = ConfigDict(extra="forbid")

    inputs: int | Question
    image: int | None = None
    question: str | None = None
    parameters: Parameters | None = None

    @property
    def asks(self) -> str | None:
        """The question, wherever a client puts it."""
        return self.inputs.question if isinstance(self.inputs, Question) else self.question

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams. Raises InvalidRequest."""
        given = self.parameters or Parameters()
        asked = dict(given.generation_parameters or {})
        if asked.pop("do_sample", False):
            asked.setdefault("temperature", 1.0)
        else:  # as `generate` does, which draws only if it is told to
            asked = {k: v for k, v in asked.items() if k not in ("temperature", "top_k", "top_p")}
        if given.max_new_tokens is not None:
            asked["max_new_tokens"] = given.max_new_tokens
        if unknown := sorted(asked.keys() - SAMPLING):
            raise InvalidRequest(
                f"unknown parameter {shown(unknown[0])}: there are {', '.join(sorted(SAMPLING))}"
            )
        return checked(CaptionFields, asked).sampling


class HubHandler(Page, IntakeHandler):
    """Takes an image as it is, or in JSON; GET is the page."""

    def shown_error(self, answer: ErrorStatus, message: str) -> Any:
        """As the hub's client reads it."""
        return {"error": message, "error_type": answer.code}

    def check_head(self) -> None:
        """Raises InvalidRequest or UnsupportedMediaType."""
        self._kind, _ = media_type(self.request.headers.get("Content-Type", ""))
        check_media_type(self._kind)

    async def serve(self, body: bytes) -> None:
        """Answer with the caption, or with the answer and how likely its tokens are on average."""
        if not body:
            raise InvalidRequest("the body is empty: send an image")
        images, asked = [body], HubRequest(inputs=0)
        if self._kind == JSON:
            parts = await self.json_parts(body)
            asked, images = checked(HubRequest, parts.fields), list(dict.fromkeys(parts.images))
        if len(images) != 1:
            raise InvalidRequest(f"the body has {len(images)} images: send one, in inputs")
        model = self.service.model()
        self.model = model.name
        request = model.request(asked.asks, asked.sampling)
        caption = await self.service.caption(model, request, images, self.client)
        self.timing = caption.timing
        if asked.asks is None:
            self.write_json([{"generated_text": caption.text}])
        else:
            self.write_json([{"answer": caption.text, "score": exp(caption.score or 0)}])
