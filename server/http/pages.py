"""GET /: what this is and how to call it. Unknown routes end here too."""

import json
from functools import cache
from pathlib import Path

import tornado.web

from server.http.handler import Handler
from server.http.openapi import document

_PAGE = Path(__file__).with_name("page.html")
_SAMPLES = Path(__file__).parents[2] / "demo" / "samples"
_DEMO = "vignette-demo"
_FACTS = "{/* what the server says of itself */}"


class Page(Handler):
    """A short page to try the service on."""

    async def get(self) -> None:
        """HTML, self-contained but for the samples of the demo model."""
        await self.paced()
        models = {name: model.manifest.about for name, model in self.service.models.items()}
        facts = {"models": models, "samples": _samples() if _DEMO in models else []}
        self.set_header("Content-Type", "text/html; charset=utf-8")
        # "</script>" in a text would end the script that it stands in.
        self.finish(_page().replace(_FACTS, json.dumps(facts).replace("<", "\\u003c")))


class SampleHandler(Handler):
    """GET /samples/NAME: a picture to try the demo model on."""

    async def get(self, name: str) -> None:
        """One of the files, which the page names."""
        await self.paced()
        if _DEMO not in self.service.models or name not in _samples():
            raise tornado.web.HTTPError(404)
        self.set_header("Content-Type", "image/png")
        self.finish((_SAMPLES / name).read_bytes())


class OpenApiHandler(Handler):
    """GET /openapi.json: the whole interface, for clients and generators."""

    async def get(self) -> None:
        """OpenAPI 3.1."""
        await self.paced()
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(document())


class NotFoundHandler(Handler):
    """Any other path, whatever the method."""

    async def get(self, *path: str) -> None:
        """404."""
        raise tornado.web.HTTPError(404)

    post = put = patch = delete = options = head = get


@cache
def _page() -> str:
    return _PAGE.read_text()


@cache
def _samples() -> list[str]:
    return sorted(path.name for path in _SAMPLES.glob("*.png"))
