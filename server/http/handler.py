"""What all handlers share: the service, errors in one JSON shape, and patience with its end."""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Awaitable
from functools import partial
from types import TracebackType
from typing import Any

import tornado.web
from msgspec import to_builtins

from server.addresses import address_of, group_of, networks
from server.errors import INTERNAL, ErrorStatus, answer_to
from server.http.answers import ErrorAnswer, ErrorDetail
from server.http.origins import PREFLIGHT, cors_headers
from server.logs import request_id
from server.service.service import Service

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_UNREAD_SECONDS = 2.0  # that an answer may lie unread before its connection makes room for others
_ETAGS = 1000  # characters of If-None-Match
_LATE = 256  # connections that wait for no caption: who is hung up on comes again at once
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def _bare(error: BaseException) -> BaseException:
    """An error without what led to it."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error


def as_json(content: Any) -> str:
    """As people can read it, UTF-8 as it is. content: dicts, lists or types of ours."""
    return json.dumps(to_builtins(content), ensure_ascii=False)


@tornado.web.stream_request_body  # or Tornado would parse bodies that nobody asked for
class Handler(tornado.web.RequestHandler):
    """Base of our handlers."""

    def initialize(self, service: Service) -> None:
        """Tornado passes the service of the app here."""
        self.service = service
        self.name = ""
        self.streamed = 0  # bytes that were written before the end
        self.model = ""  # the name of the one that is asked
        self.code = "ok"  # or of the error that is answered
        self.key: str | None = None  # the name of the client's API key
        peer = self.request.remote_ip or ""
        self.address = address_of(
            peer,
            self.request.headers.get("X-Forwarded-For", ""),
            networks(service.settings.trusted_proxies),
        )
        self._refusing = False
        self._timer: asyncio.TimerHandle | None = None  # of a refusal that waits

    def set_default_headers(self) -> None:
        """Nothing that is answered is to be guessed at or kept."""
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        """Every request has a number, its client's or ours, that is answered and logged."""
        given = self.request.headers.get("X-Request-Id", "")
        self.name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(self.name)
        self._set_common_headers()

    @property
    def client(self) -> str:
        """With whom the request shares its turns: all of one key, or of one address."""
        return self.key or group_of(self.address)

    def _set_common_headers(self) -> None:
        """Tornado forgets all headers before it answers an error."""
        if self.name:
            self.set_header("X-Request-Id", self.name)
        allowed = self.service.settings.cors_origins
        for name, value in cors_headers(self.request.headers.get("Origin"), allowed).items():
            self.set_header(name, value)

    async def options(self, *path: str) -> None:
        """What a browser asks before a page of another origin may send its request."""
        await self.paced()
        if not self.service.settings.cors_origins:
            raise tornado.web.HTTPError(405)
        for name, value in PREFLIGHT.items():
            self.set_header(name, value)
        self.set_status(204)
        self.finish()

    def check_etag_header(self) -> bool:
        """Whether the client has this answer already; a header that takes long to read is none."""
        given = self.request.headers.get("If-None-Match", "")
        return len(given) <= _ETAGS and super().check_etag_header()

    def head(self, *path: str) -> Awaitable[None] | None:
        """Where there is something to get: the same without the body, which Tornado leaves out."""
        return self.get(*path)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """A body is dropped as it comes, where none is wanted."""
        return None

    def finish(self, chunk: str | bytes | dict | None = None) -> "asyncio.Future[None]":
        """Answer; a client that does not take its answer is cut off, and counts until then."""
        written = super().finish(chunk)
        stream = self.request.connection.stream  # type: ignore[union-attr]
        if stream.writing():
            loop, budget = asyncio.get_running_loop(), self.service.budget
            size = len(chunk or b"") + self.streamed
            start, unread = loop.time(), self.settings["unread"]
            budget.owe(size, self.client)

            def look() -> None:
                waited = loop.time() - start
                if stream.writing() and waited < self.service.settings.body_seconds:
                    if waited > _UNREAD_SECONDS:
                        unread[stream] = None  # it makes room for others
                    loop.call_later(_LOOK_SECONDS, look)
                    return
                if stream.writing():
                    stream.close()
                unread.pop(stream, None)
                budget.let_go(size, self.client)

            loop.call_later(_LOOK_SECONDS, look)
        return written

    def write_json(self, content: Any) -> None:
        """Answer with JSON that people can read, UTF-8 as it is."""
        self.finish_json(as_json(content))

    def finish_json(self, text: str) -> None:
        """Answer with what `as_json` made."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(text + "\n")

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer an error, at once or when it is this client's turn to be refused."""
        if self._refusing or self._finished:
            return
        if self._headers_written:  # in the middle of a stream there is nothing to say any more
            error = kwargs.get("exc_info", (None, None, None))[1]
            self.outcome(answer_to(error, status_code).code)
            self.request.connection.stream.close()  # type: ignore[union-attr]
            self.on_finish()  # Tornado calls it for what has an end
            return
        self._refusing = True
        stream, late = self.request.connection.stream, self.settings["late"]  # type: ignore[union-attr]
        wait = 0.0 if stream.closed() else self.service.refusals.spend(self.client, 1)
        if wait and len(late) >= _LATE:
            stream.close()  # this client gets more than it can be refused
            wait = 0.0
        if not wait:
            super().send_error(status_code, **kwargs)
            return
        if error := kwargs.get("exc_info", (None, None, None))[1]:
            # Its frames hold the body and the images, and it was logged.
            kwargs["exc_info"] = (type(error), _bare(error), None)
        late[stream] = None
        self._answer_error = partial(super().send_error, status_code, **kwargs)
        self._timer = asyncio.get_running_loop().call_later(wait, self._refuse)

    async def paced(self, visits: float = 1) -> None:
        """Wait until this client may have what costs a front-end something and is no caption."""
        await self.held_back(self.service.visits.spend(self.client, visits))

    async def held_back(self, wait: float) -> None:
        """Wait so many seconds; a client of which too many wait is cut off."""
        stream, late = self.request.connection.stream, self.settings["late"]  # type: ignore[union-attr]
        if not wait:
            return
        if len(late) >= _LATE:
            stream.close()
            await asyncio.sleep(_LOOK_SECONDS)  # a caption is taken back by then, and not begun
            return
        late[stream] = None  # it makes room for others
        try:
            await asyncio.sleep(wait)
        finally:
            late.pop(stream, None)

    def _refuse(self) -> None:
        """Answer a refusal that waited; to a client that has gone, so that all is given back."""
        if self._timer is not None:
            self._timer.cancel()
            self.settings["late"].pop(self.request.connection.stream, None)  # type: ignore[union-attr]
            if not self._finished:
                self._answer_error()

    def on_connection_close(self) -> None:
        """Nobody waits for a refusal any more."""
        super().on_connection_close()
        self._refuse()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer any error, ours or Tornado's, by the table in `server.errors`."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        answer = answer_to(error, status_code)
        self.set_status(answer.status)
        self._set_common_headers()
        retry_after = getattr(error, "retry_after", None)
        if retry_after is not None:
            self.set_header("Retry-After", str(retry_after))
        if answer.status == 413:
            self.set_header("Connection", "close")
        if answer.status == 401:
            self.set_header("WWW-Authenticate", "Bearer")
        if answer.status == 405:
            self.set_header("Allow", self.allowed())
        self.code = answer.code
        self.outcome(answer.code)
        self.write_json(self.shown_error(answer, answer.message or str(error)))

    def shown_error(self, answer: ErrorStatus, message: str) -> Any:
        """An error in the shape of its protocol."""
        return ErrorAnswer(ErrorDetail(answer.code, message))

    def outcome(self, code: str) -> None:
        """Called once with the code of an error; those who count requests override it."""

    def allowed(self) -> str:
        """The methods that this handler serves, for the header Allow."""
        default = tornado.web.RequestHandler
        names = [n for n in ("get", "post") if getattr(type(self), n) != getattr(default, n)]
        return ", ".join(names).upper().replace("GET", "GET, HEAD")

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Log only what is not the client's doing."""
        status = value.status_code if isinstance(value, tornado.web.HTTPError) else 500
        answer = answer_to(value, status)
        if answer is INTERNAL:
            log.error("error in %s", self.request.path, exc_info=(typ, value, tb))  # type: ignore[arg-type]
        elif answer.status == 500:
            log.error("request %s: %s: %s", self.name, answer.code, value)
