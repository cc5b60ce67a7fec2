"""GET /: what this is and how to call it. Unknown routes end here too."""

from functools import cache
from pathlib import Path

import tornado.web

from server.handlers.base import Handler

_PAGE = Path(__file__).parents[1] / "page.html"
_OPENAPI = Path(__file__).parents[1] / "openapi.json"


class PageHandler(Handler):
    """A short page to try the service on."""

    def get(self) -> None:
        """HTML, self-contained."""
        self.set_header("Content-Type", "text/html; charset=utf-8")
        self.finish(_page())


class OpenApiHandler(Handler):
    """GET /openapi.json: the whole interface, for clients and generators."""

    def get(self) -> None:
        """OpenAPI 3.1."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(_openapi())


class NotFoundHandler(Handler):
    """Any other path, whatever the method."""

    def get(self) -> None:
        """404."""
        raise tornado.web.HTTPError(404)

    post = put = patch = delete = options = head = get


@cache
def _page() -> str:
    return _PAGE.read_text()


@cache
def _openapi() -> str:
    return _OPENAPI.read_text()
