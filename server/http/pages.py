"""GET / to try the service, GET /docs with its interface, and their static files."""

import hashlib
import json
import math
from functools import cache
from pathlib import Path

import tornado.web

from server.http.handler import Handler
from server.http.openapi import document
from server.refusals import TooFast

_STATIC = Path(__file__).with_name("static")
_SAMPLES = Path(__file__).parents[2] / "demo" / "samples"
_DEMO = "vignette-demo"
_ASKED = "vqa"  # in the names of checkpoints that were trained to answer questions
_PAGE = 32 * 1024  # bytes of a file charged as another page
_PAGES_SECONDS = 4.0  # of debt for pages, above which large ones are refused
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Page(Handler):
    """Base of HTML pages."""

    def show(self, content: str) -> None:
        """Answer with a page that may load and run nothing from other origins."""
        self.set_header("Content-Type", _TYPES[".html"])
        self.set_header("Content-Security-Policy", _POLICY)
        self.set_header("Referrer-Policy", "no-referrer")
        self.finish(content)


class Page(_Page):
    """GET /: a page to try the service on."""

    async def get(self) -> None:
        """HTML; its scripts, styles and images come from this server, too."""
        await self.paced()
        models = {
            name: {"about": model.manifest.about, "asked": name == _DEMO or _ASKED in name}
            for name, model in self.service.models.items()
        }
        facts = {
            "models": models,
            "samples": _samples() if _DEMO in models else [],
            "ops": self.service.settings.ops_port is None,
        }
        # "</script>" in a text would end the script element.
        written = json.dumps(facts).replace("<", "\\u003c")
        self.show(_read("page.html").decode().replace("FACTS", written))


class DocsHandler(_Page):
    """GET /docs: interactive API documentation."""

    async def get(self) -> None:
        """HTML."""
        await self.paced()
        self.show(_read("docs.html").decode())


class StaticHandler(Handler):
    """GET /static/NAME: the pages' static files."""

    async def get(self, name: str) -> None:
        """The file of that name, or 404."""
        known = name in _files()
        pages = 1 + (len(_read(name)) // _PAGE if known else 0)
        if pages > 1:  # the file may stay unread
            self._check_page()
        await self.paced(pages)
        if not known:
            raise tornado.web.HTTPError(404)
        self._name = name
        self.set_header("Content-Type", _TYPES[Path(name).suffix])
        self.set_header("Cache-Control", "no-cache")  # revalidated each time, answered 304
        self.finish(_read(name))

    def _check_page(self) -> None:
        """Raise TooFast or QueueFull if a client, or all together, have too many large pages."""
        if (wait := self.service.rates.pages.owed(self.client)) >= _PAGES_SECONDS:
            raise TooFast("too many pages are asked for: ask for fewer", math.ceil(wait))
        self.service.budget.check_unread()

    def compute_etag(self) -> str | None:
        """The cached hash: hashing the largest file takes milliseconds."""
        return _etag(self._name)


class SampleHandler(Handler):
    """GET /samples/NAME: a picture to try the demo model on."""

    async def get(self, name: str) -> None:
        """The sample of that name, or 404."""
        await self.paced()
        if _DEMO not in self.service.models or name not in _samples():
            raise tornado.web.HTTPError(404)
        self.set_header("Content-Type", "image/png")
        self.finish((_SAMPLES / name).read_bytes())


class OpenApiHandler(Handler):
    """GET /openapi.json: the API description, for clients and generators."""

    async def get(self) -> None:
        """The OpenAPI 3.1 document."""
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
def _files() -> list[str]:
    names = (path.relative_to(_STATIC) for path in _STATIC.rglob("*"))
    return [name.as_posix() for name in names if name.suffix in _TYPES]


@cache
def _etag(name: str) -> str:
    return f'"{hashlib.sha256(_read(name)).hexdigest()}"'


@cache
def _read(name: str) -> bytes:
    return (_STATIC / name).read_bytes()


@cache
def _samples() -> list[str]:
    return sorted(path.name for path in _SAMPLES.glob("*.png"))
