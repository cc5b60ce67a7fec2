"""Caption requests of any protocol over HTTP: client, body and outcome.

The API key and the headers are checked before any of the body is kept or read.
"""

import asyncio
import re
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Any

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Timing
from server.fairness.byte_budget import Incoming
from server.http.connections import Connections
from server.http.handler import Handler, as_json
from server.ipc.deadline import Expired
from server.protocols.errors import BodyTooLarge, UnsupportedMediaType, answer_to
from server.requests.json_body import json_parts
from server.requests.multipart_body import PIECE
from server.requests.parts import Parts, shown
from server.service.keys import sent
from server.service.service import Service
from server.tasks import strip_error
from server.telemetry.logs import plain

_PATH = 200  # characters traced
EVENTS = "text/event-stream"
_DRAINED = 20  # times the body limit: read and dropped of a refused body, at most
_FREE = 256 * 1024  # bytes of each body without a rate limit: most images are no larger
_STEP_SECONDS = 0.02  # shorter waits are left to later chunks
_CLIENT_GONE = 499, "Client Closed Request"  # in the access log alone
_WHOLE, _LENGTH = re.compile(r"[0-9]+"), re.compile(r"[0-9]{1,15}")  # of a Content-Length


class IntakeHandler(Handler):
    """Receives a body, limited in size and rate. Subclasses add `check_head` and `serve`."""

    def initialize(self, service: Service, connections: Connections) -> None:
        """Start with an empty body."""
        super().initialize(service, connections)
        self.streams = False  # whether a stream of events has begun
        self.timing: Timing | None = None  # of the caption, once there is one
        self._body = bytearray()
        self._images = self._received = self._held = 0
        self._limit = service.settings.max_body_bytes
        self._task: asyncio.Task | None = None
        self._gone = False
        self._payer = self.client  # the client charged for the body's bytes
        self._incoming: Incoming | None = None
        self._refused: VignetteError | None = None  # without its frames, which refer to this
        self._keys = service.keys  # as they were when the request came
        self._place = ExitStack()  # among the requests of the API key

    def check_head(self) -> None:
        """Raise a VignetteError if the headers announce a body that the protocol rejects."""
        raise NotImplementedError

    async def serve(self, body: bytes) -> None:
        """Answer a request whose body is complete. A VignetteError becomes the answer."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Refuse what the headers alone rule out, before any of the body is kept or read.

        A client that is still sending would lose an early answer with its connection, so the body
        is read and dropped first, unless the client expects 100-continue or sends far too much.
        """
        super().prepare()
        if self.request.method != "POST":
            return
        most = _DRAINED * self._limit
        self.request.connection.set_max_body_size(most + PIECE)  # type: ignore[union-attr]
        declared = self.request.headers.get("Content-Length", "0")
        length = int(declared) if _LENGTH.fullmatch(declared) else most + 1
        try:
            if not _WHOLE.fullmatch(declared):
                raise InvalidRequest(f"Content-Length {shown(declared)} is no number")
            self.take_places(1)
            self._payer = self.client
            self.check_head()
            encoding = self.request.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":
                raise UnsupportedMediaType(
                    f"Content-Encoding {shown(encoding)} is not taken: send the body as it is"
                )
            if length > self._limit:
                raise self._too_large()
        except VignetteError as error:
            waits = self.request.headers.get("Expect", "").lower() == "100-continue"
            if waits or length > most:
                self._refuse_now(error)
            else:
                self._refused = strip_error(error)

    def take_places(self, count: int) -> None:
        """Count captions, against the API key if there are keys, until the answer is over.

        Raises as `Keys.enter`.
        """
        held, self._images = self._images, self._images + count
        if self._keys is not None and count:
            key = sent(self.request.headers)  # header names match in any case
            self.key = self._place.enter_context(self._keys.enter(key, count, held))

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        """Collect the body, checking its size: a chunked body does not declare one."""
        if self._finished:
            return None
        self._received += len(chunk)
        if self._received > _DRAINED * self._limit:
            self._refuse_now(self._refused or self._too_large())
            return None
        if self._refused is None:
            try:
                if self._received > self._limit:
                    raise self._too_large()
                if self._incoming is None:
                    self._incoming = self.service.budget.begin(self._payer, self._make_room)
                self.hold(len(chunk))
            except VignetteError as error:
                self._refused = strip_error(error)
                self._drop_body()
            else:
                self._body += chunk
        if self._received <= _FREE:
            return None
        wait = self.service.rates.uploads.spend(self.client, len(chunk))
        return asyncio.sleep(wait) if wait > _STEP_SECONDS else None

    def hold(self, size: int) -> None:
        """Count bytes of this request in the byte budget. Raises QueueFull."""
        self.service.budget.hold(size, self._payer, self._incoming)
        self._held += size

    def _came(self) -> None:
        """Note that the body has ended."""
        if self._incoming is not None:
            self.service.budget.end(self._incoming)
            self._incoming = None

    def _make_room(self) -> None:
        """Close the connection of a client that has all but stopped sending."""
        self._drop_body()
        self.stream.close()

    def _drop_body(self) -> None:
        self._came()
        self._body = bytearray()
        if self._held:
            self.service.budget.release(self._held, self._payer)
        self._held = 0

    def _refuse_now(self, error: VignetteError) -> None:
        """Answer and close while the body is still arriving."""
        self._refused = strip_error(error)  # in case the body ends before the delayed answer
        self._drop_body()
        self.send_error(exc_info=(type(error), error, None))

    def _too_large(self) -> BodyTooLarge:
        limit = f"{self._limit / 1e6:g} MB"
        return BodyTooLarge(f"the body is larger than {limit}: send a smaller image")

    async def post(self) -> None:
        """Serve the request, or raise the error that was found in its head or body."""
        try:
            await self._post()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._gone or task is None:
                raise
            # Tornado's frames refer to a task that ends as cancelled, which refers to them.
            task.uncancel()
            self.code = "cancelled"
            self.set_status(*_CLIENT_GONE)

    async def _post(self) -> None:
        if self._finished:
            return
        if self._refused is not None:
            refused, self._refused = self._refused, None  # else its frames keep this handler alive
            raise refused
        self._came()
        self._task = asyncio.current_task()
        await self.held_back(self.service.rates.owed(self.client))
        self.service.check_room(self.client)
        body = bytes(self._body)
        self._body = bytearray()
        await self.serve(body)
        if self.code == "ok":
            self.service.rates.was_served(self.client)
        self.outcome(self.code)

    def send(self, content: Any, kind: str | None = None) -> None:
        """Write a server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events).

        Does not wait for the client to read: unread events are short, count in the byte budget once
        the answer is over, and hold up nothing in the engine.
        """
        event = f"event: {kind}\n" if kind else ""
        event += f"data: {as_json(content)}\n\n"
        if not self.streams:
            self.streams = True
            if self.request.version == "HTTP/1.0":  # which has no chunks: its end is the end
                self.request.connection._disconnect_on_finish = True  # type: ignore[union-attr]
            self.set_header("Content-Type", EVENTS)
            self.set_header("X-Accel-Buffering", "no")  # else nginx buffers the stream
        self.streamed += len(event)
        self.write(event)
        self.flush()

    def failed(self, error: VignetteError) -> Any:
        """Body of an error event within a stream; an error that is the server's fault is logged."""
        self.log_exception(type(error), error, error.__traceback__)
        answer = answer_to(error)
        self.code = answer.code
        return self.shown_error(answer, answer.message or str(error))

    async def json_parts(self, body: bytes) -> Parts:
        """Parse a JSON body, a large one in another process. Raises InvalidRequest, and Expired
        after the default deadline, because the request's own may be in the body.
        """
        self.hold(len(body))  # the images are copied out of it
        if len(body) <= PIECE:
            return json_parts(body)
        try:
            async with asyncio.timeout(self.service.settings.timeout_seconds):
                return await self.service.decoders.parts(body, self.client)
        except TimeoutError:
            raise Expired("the deadline passed before the body was read") from None

    def outcome(self, code: str) -> None:
        """Count and trace how the request ended, unless the client had gone before."""
        if not self._gone:
            self.service.count(self.model_name, self.key, code)
            if self.service.tracer is not None:
                stages = {} if self.timing is None else self.timing.stages
                method = self.request.method
                known = method if method in self.SUPPORTED_METHODS else "HTTP"
                span = f"{known} {plain(self.request.path or '', _PATH)}"
                headers = self.request.headers
                self.service.tracer.record(
                    span, headers, code, stages, self.request.request_time(), self.request_id
                )

    def on_finish(self) -> None:
        """Release the body's bytes, and the place among its key's requests."""
        self._drop_body()
        self._place.close()

    def on_connection_close(self) -> None:
        """The client has gone: cancel its request, which removes it from the queue or batch.

        The wasted work is charged to the client: one that does this often has to wait.
        """
        super().on_connection_close()  # wakes tasks that wait for the rest of the body
        self._drop_body()
        if self._task is None or self._task.done():
            self._place.close()
            self.ui = None  # type: ignore[assignment]  # it refers to this; `finish` isn't called
        else:
            self.outcome("cancelled")
            self.service.rates.was_abandoned(self.client, self._images)
            self._gone = True
            self._task.add_done_callback(lambda _: self._place.close())
            self._task.cancel()
