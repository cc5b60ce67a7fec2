"""Base of all handlers: access to the service, errors in one JSON shape, rate limits."""

import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any

import tornado.web
from msgspec import to_builtins

from server.addresses import group_of
from server.http.answers import ErrorAnswer, ErrorDetail
from server.http.client_stream import ClientStream
from server.http.connections import Connections
from server.http.errors import http_answer
from server.http.origins import PREFLIGHT, cors_headers
from server.protocols.errors import INTERNAL, ErrorStatus
from server.refusals import RetryLater
from server.service.service import Service
from server.tasks import strip_error, strip_future_error
from server.telemetry.logs import request_id

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2
_UNREAD_SECONDS = 2.0  # after which the connection of an unread answer may be closed for a new one
_QUERY_COST = 2048  # characters of a query, which was parsed, charged as one refusal
_ETAGS = 1000  # characters of If-None-Match
_LATE = 256  # connections held back, as a client that is cut off reconnects at once
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def as_json(content: Any) -> str:
    """Readable JSON with unescaped UTF-8. content: dicts, lists or msgspec structs."""
    return json.dumps(to_builtins(content), ensure_ascii=False)


@tornado.web.stream_request_body  # else Tornado parses bodies that no handler wants
class Handler(tornado.web.RequestHandler):
    """Base class of all handlers."""

    def initialize(self, service: Service, connections: Connections) -> None:
        """Called by Tornado with the application's parts."""
        self.service, self.connections = service, connections
        self.request_id = ""
        self.streamed = 0  # bytes written before finish()
        self.model_name = ""  # of the requested model
        self.code = "ok"  # or the code of the error answered
        self.key: str | None = None  # the name of the client's API key
        self.address = self.stream.address
        self._refusing = False
        self._refusal: asyncio.Task[None] | None = None  # a delayed one

    def set_default_headers(self) -> None:
        """Forbid MIME sniffing and caching, and omit the Server header."""
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Cache-Control", "no-store")
        self.clear_header("Server")

    def prepare(self) -> None:
        """Set the request id, the client's or a new one, which is returned and logged."""
        given = self.request.headers.get("X-Request-Id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(self.request_id)
        self._set_common_headers()

    @property
    def client(self) -> str:
        """The client for fairness and rate limits: its API key's name, or its address group."""
        return self.key or group_of(self.address)

    @property
    def stream(self) -> ClientStream:
        """The client's connection."""
        stream = self.request.connection.stream  # type: ignore[union-attr]
        assert isinstance(stream, ClientStream)
        return stream

    def _set_common_headers(self) -> None:
        """Set headers of every answer; again for errors, as Tornado clears all headers then."""
        if self.request_id:
            self.set_header("X-Request-Id", self.request_id)
        allowed = self.service.settings.cors_origins
        for name, value in cors_headers(self.request.headers.get("Origin"), allowed).items():
            self.set_header(name, value)

    async def options(self, *path: str) -> None:
        """Answer a browser's CORS preflight request; 405 if CORS is off."""
        await self.paced()
        if not self.service.settings.cors_origins:
            raise tornado.web.HTTPError(405)
        for name, value in PREFLIGHT.items():
            self.set_header(name, value)
        self.set_status(204)
        self.finish()

    def check_etag_header(self) -> bool:
        """Whether the client has this answer already; an overlong If-None-Match is ignored."""
        given = self.request.headers.get("If-None-Match", "")
        return len(given) <= _ETAGS and super().check_etag_header()

    def head(self, *path: str) -> Awaitable[None] | None:
        """Same as GET; Tornado leaves out the body."""
        return self.get(*path)

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Drop the body: only subclasses that override this want one."""
        return None

    def finish(self, chunk: str | bytes | dict | None = None) -> "asyncio.Future[None]":
        """Answer; unread bytes count against the client until it reads them or is cut off."""
        if isinstance(chunk, str):
            chunk = chunk.encode()
        written = super().finish(chunk)
        stream = self.stream
        if stream.writing():
            loop, budget = asyncio.get_running_loop(), self.service.budget
            size = len(chunk or b"") + self.streamed
            start, unread = loop.time(), self.connections.unread
            budget.hold_answer(size, self.client)

            def look() -> None:
                waited = loop.time() - start
                if stream.writing() and waited < self.service.settings.body_seconds:
                    if waited > _UNREAD_SECONDS:
                        unread[stream] = None  # may be closed for a new connection
                    loop.call_later(_LOOK_SECONDS, look)
                    return
                if stream.writing():
                    stream.close()
                unread.pop(stream, None)
                budget.release_answer(size, self.client)

            loop.call_later(_LOOK_SECONDS, look)
        return written

    def write_json(self, content: Any) -> None:
        """Answer with `content` as readable JSON."""
        self.finish_json(as_json(content))

    def finish_json(self, text: str) -> None:
        """Answer with JSON text from `as_json`."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.finish(text + "\n")

    def send_error(self, status_code: int = 500, **kwargs: Any) -> None:
        """Answer with an error, at once or after the delay of the client's refusal limit."""
        if self._refusing or self._finished:
            return
        if self._headers_written:  # mid-stream, no error status can be sent any more
            error = kwargs.get("exc_info", (None, None, None))[1]
            self.outcome(http_answer(error, status_code).code)
            self.stream.close()
            self.on_finish()  # Tornado calls it only for finished answers
            return
        self._refusing = True
        self._spend(group_of(self.address))
        cost = 1 + len(self.request.query) / _QUERY_COST
        wait = 0.0 if self.stream.closed() else self.service.rates.refusals.spend(self.client, cost)
        if not wait:
            super().send_error(status_code, **kwargs)
            return
        if error := kwargs.get("exc_info", (None, None, None))[1]:
            # The error's frames hold the body and the images, and it has been logged.
            kwargs["exc_info"] = (type(error), strip_error(error), None)
        answer = partial(super().send_error, status_code, **kwargs)
        self._refusal = asyncio.create_task(self._refuse_after(wait, answer))

    async def paced(self, pages: float = 1) -> None:
        """Apply the client's rate limit for non-caption requests. pages: cost of this one."""
        await self.held_back(self._spend(self.client, pages))

    def _spend(self, client: str, pages: float = 1) -> float:
        """Charge pages, and the parsing of the head; returns the seconds that the client owes."""
        return self.connections.pages.spend(client, pages + self.stream.head)

    async def held_back(self, wait: float) -> None:
        """Wait so many seconds, maybe none, and for a turn of the event loop; close the connection
        if too many wait for seconds already.
        """
        stream, late = self.stream, self.connections.late
        if wait and len(late) >= _LATE:
            stream.close()
            await asyncio.sleep(_LOOK_SECONDS)  # a request for captions is cancelled meanwhile
            return
        try:
            if wait:
                late[stream] = None  # may be closed for a new connection
                await asyncio.sleep(wait)
            await self.connections.turns.take(self.client)
        finally:
            late.pop(stream, None)

    async def _refuse_after(self, wait: float, answer: Callable[[], None]) -> None:
        """Refuse after a delay; at once if the client has gone, so that everything is released."""
        with contextlib.suppress(asyncio.CancelledError):
            await self.held_back(wait)
        self._refusal = None
        if not self._finished:
            answer()

    def on_connection_close(self) -> None:
        """The client has gone: end a delayed refusal now, which frees its resources."""
        super().on_connection_close()
        self._spend(group_of(self.address))  # its next connections come in one by one, if it owes
        # After the tasks that wait for the rest of the body have been told that there is none.
        self.request._body_future.add_done_callback(strip_future_error)
        if self._refusal is not None:
            self._refusal.cancel()

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer any error, ours or Tornado's."""
        error = kwargs.get("exc_info", (None, None, None))[1]
        answer = http_answer(error, status_code)
        self.set_status(answer.status)
        self._set_common_headers()
        if isinstance(error, RetryLater):
            self.set_header("Retry-After", str(error.retry_after))
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
        """The error body in the protocol's format."""
        return ErrorAnswer(ErrorDetail(answer.code, message))

    def outcome(self, code: str) -> None:
        """Called once with the code of an error; handlers that count requests override it."""

    def allowed(self) -> str:
        """The methods that this handler serves, for the Allow header."""
        default = tornado.web.RequestHandler
        names = [n for n in ("get", "post") if getattr(type(self), n) != getattr(default, n)]
        return ", ".join(names).upper().replace("GET", "GET, HEAD")

    def log_exception(
        self,
        typ: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Log only errors that are not the client's fault."""
        status = value.status_code if isinstance(value, tornado.web.HTTPError) else 500
        answer = http_answer(value, status)
        if answer is INTERNAL:
            log.error("error in %s", self.request.path, exc_info=(typ, value, tb))  # type: ignore[arg-type]
        elif answer.status == 500:
            log.error("request %s: %s: %s", self.request_id, answer.code, value)
