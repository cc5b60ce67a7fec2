"""Limits on the calls of an address: how many at once, and how many a second.

Every method is registered as one whose requests and answers stream, which is the same on the wire.
So a call counts from its headers until its client has taken the answer, and both waits end.
"""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from server.grpc.calls import Context, address_in
from server.service.service import Service

_CROWDED = 1536  # calls of all addresses, above which calls that wait for clients are ended
_EACH = 256  # calls at once of one address
_FEW = 16  # calls of an address that are never ended for others
_LARGEST = 4096  # bytes of a message to a method that does not caption
_END_SECONDS = 1.0  # for a client to take the status of a call that is ended
_TOO_MANY = "too_many_calls: this address has, or makes, more calls than one may: wait for answers"
_TOO_LARGE = "invalid_request: the message is larger than this method takes"
_NO_MESSAGE = "invalid_request: the call has no message, or not one of this method's"
_TOO_SLOW = "too_slow: the message did not come, or the answer was not taken, in time"


class Bounds(grpc.aio.ServerInterceptor):
    """Limits each address's calls at once, and its non-captioning calls per second."""

    def __init__(self, service: Service, captioning: frozenset[str]) -> None:
        """captioning: full names of captioning methods, which have rate limits of their own."""
        self._service, self._captioning = service, captioning
        self._calls: Counter[str] = Counter()
        self._idle: dict[str, dict[_BoundedCall, None]] = {}  # by address, oldest first

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, wrapped to enforce the limits."""
        handler = await continuation(details)
        if handler is None:
            return None
        bounded = self._bounded(handler, captions=details.method in self._captioning)
        return grpc.stream_stream_rpc_method_handler(bounded, None, handler.response_serializer)

    def _bounded(self, handler: Any, captions: bool) -> Callable[..., Any]:
        function = _function(handler)

        async def bounded(_: Any, context: Context) -> None:
            call = _BoundedCall(self, self._service, handler, context, captions)
            with self._place(call.address) as place:
                asks = not (captions or handler.request_streaming)
                if not place or (asks and self._service.rates.pages.spend(call.address, 1)):
                    await call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
                try:
                    await call.answer(function)
                except TimeoutError:
                    await call.end(grpc.StatusCode.DEADLINE_EXCEEDED, _TOO_SLOW)
                except asyncio.CancelledError:
                    if call.evicted:
                        await call.end(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
                    raise

        return bounded

    @contextmanager
    def _place(self, address: str) -> Iterator[bool]:
        """Count a call; yields whether its address may have one more."""
        self._calls[address] += 1
        if self._calls.total() > _CROWDED:
            self._make_room()
        try:
            yield self._calls[address] <= _EACH
        finally:
            self._calls[address] -= 1
            if not self._calls[address]:
                del self._calls[address]

    def _make_room(self) -> None:
        """End the oldest call that waits for its client, of the address with the most calls."""
        address = max(self._idle, key=self._calls.__getitem__, default=None)
        if address is not None and self._calls[address] > _FEW:
            next(iter(self._idle[address])).evict()

    @contextmanager
    def idle(self, call: "_BoundedCall") -> Iterator[None]:
        """The call waits for its client meanwhile."""
        self._idle.setdefault(call.address, {})[call] = None
        try:
            yield
        finally:
            self.busy(call)

    def busy(self, call: "_BoundedCall") -> None:
        """The call waits for its client no more."""
        idle = self._idle.get(call.address, {})
        idle.pop(call, None)
        if not idle:
            self._idle.pop(call.address, None)


class _BoundedCall:
    """A call, and the limits on its messages and answers."""

    def __init__(
        self, bounds: Bounds, service: Service, handler: Any, context: Context, captions: bool
    ) -> None:
        self._bounds, self._service, self._handler = bounds, service, handler
        self._context, self.captions = context, captions
        self.address = address_in(service, context)
        self.evicted = False
        self._task = asyncio.current_task()

    def evict(self) -> None:
        """End the call, as others need its place."""
        self._bounds.busy(self)
        self.evicted = True
        assert self._task is not None
        self._task.cancel()

    async def answer(self, function: Callable[..., Any]) -> None:
        """Run the method. Raises TimeoutError for a client that neither sends nor takes."""
        given = _Messages(self) if self._handler.request_streaming else await self._only()
        answering = function(given, self._context)
        del given  # or this frame would hold it for as long as an error lives
        if inspect.isasyncgen(answering):
            async for answer in answering:
                await self._write(answer)
        elif not self._handler.response_streaming:
            await self._write(await answering)
        elif self.captions:
            await answering
        else:  # a watch, which may have nothing to say for long
            with self._bounds.idle(self):
                await answering

    async def message(self) -> Any:
        """The next message, or EOF. grpc's own iterator would hold it until there is another."""
        with self._bounds.idle(self):
            data = await self._context.read()
        if data is grpc.aio.EOF:
            return data
        reason = _TOO_LARGE
        if self.captions:
            return data
        if len(data) <= _LARGEST:
            with suppress(DecodeError):
                return self._handler.request_deserializer(data)
            reason = _NO_MESSAGE
        del data  # or this frame would hold it for as long as an error lives
        return await self.end(grpc.StatusCode.INVALID_ARGUMENT, reason)

    async def _only(self) -> Any:
        """The message of a method that takes one."""
        async with asyncio.timeout(self._service.settings.body_seconds):
            message = await self.message()
        if message is grpc.aio.EOF:
            await self.end(grpc.StatusCode.INVALID_ARGUMENT, _NO_MESSAGE)
        return message

    async def _write(self, answer: Any) -> None:
        with self._bounds.idle(self):
            async with asyncio.timeout(self._service.settings.body_seconds):
                await self._context.write(answer)

    async def pace(self) -> None:
        """Wait for the address's next turn to ask."""
        if not self.captions:
            await asyncio.sleep(self._service.rates.pages.spend(self.address, 1))

    async def end(self, status: grpc.StatusCode, reason: str) -> None:
        """End the call with a status, whether or not its client takes that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                await self._context.abort(status, reason)
        raise asyncio.CancelledError  # any other error would be told the client, too, and wait


@dataclass(slots=True)
class _Messages:
    """Messages of a stream as they arrive; the iterator keeps none of them."""

    call: _BoundedCall

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = await self.call.message()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        await self.call.pace()
        return message


def _function(handler: Any) -> Callable[..., Any]:
    kinds = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    return next(kind for kind in kinds if kind is not None)
