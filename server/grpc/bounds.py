"""Limits on the calls of an address: how many at once, and how many a second.

Every method is registered as one whose requests stream, which is the same on the wire: so a call
counts from its headers on, and not only once its message has arrived.
"""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from server.grpc.calls import Context, address_in
from server.service.service import Service

_CROWDED = 1536  # calls of all addresses, above which calls that wait for clients are ended
_EACH = 256  # calls at once of one address
_LARGEST = 4096  # bytes of a message to a method that does not caption
_TOO_MANY = "too_many_calls: this address has, or makes, more calls than one may: wait for answers"
_TOO_LARGE = "invalid_request: the message is larger than this method takes"
_TOO_SLOW = "the message did not come in time"


class Bounds(grpc.aio.ServerInterceptor):
    """Limits each address's calls at once, and its non-captioning calls per second."""

    def __init__(self, service: Service, captioning: frozenset[str]) -> None:
        """captioning: full names of captioning methods, which have rate limits of their own."""
        self._service, self._captioning = service, captioning
        self._calls: Counter[str] = Counter()
        self._idle: dict[str, dict[asyncio.Task[Any], None]] = {}  # by address, oldest first

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, wrapped to enforce the limits."""
        handler = await continuation(details)
        if handler is None:
            return None
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        bounded = self._bounded(handler, captions=details.method in self._captioning)
        return make(bounded, handler.request_deserializer, handler.response_serializer)

    def _bounded(self, handler: Any, captions: bool) -> Callable[..., Any]:
        function = _function(handler)

        async def bounded(_: Any, context: Context) -> Any:
            call = _BoundedCall(self, address_in(self._service, context), context, captions)
            with self._place(call.address) as place:
                asks = not (captions or handler.request_streaming)
                if not place or (asks and self._service.visits.spend(call.address, 1)):
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
                if handler.request_streaming:
                    given: Any = _Messages(call, self._service)
                else:
                    given = await call.only(self._service.settings.body_seconds)
                answering = function(given, context)
                del given  # else this frame holds the message as long as an error lives
                if not inspect.isasyncgen(answering):
                    return await call.answered(answering, watches=handler.response_streaming)
                async for answer in answering:
                    await context.write(answer)
                return None

        return bounded

    @contextmanager
    def _place(self, address: str) -> Iterator[bool]:
        """Count a call of this address; yields whether it is within the limit."""
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
        """End the oldest call waiting for its client, of the address with the most such calls."""
        if self._idle:
            idle = max(self._idle.values(), key=len)
            next(iter(idle)).cancel()

    @contextmanager
    def idle(self, address: str) -> Iterator[None]:
        """Mark the current task's call as waiting for its client."""
        task = asyncio.current_task()
        assert task is not None
        self._idle.setdefault(address, {})[task] = None
        try:
            yield
        finally:
            del self._idle[address][task]
            if not self._idle[address]:
                del self._idle[address]


@dataclass(slots=True)
class _BoundedCall:
    """A call whose messages are limited in size and time."""

    bounds: Bounds
    address: str
    context: Context
    captions: bool

    async def message(self) -> Any:
        """The next message, or EOF. grpc's own iterator would hold it until there is another."""
        with self.bounds.idle(self.address):
            message = await self.context.read()
        if message is grpc.aio.EOF:
            return message
        if not self.captions and message.ByteSize() > _LARGEST:
            await self.context.abort(grpc.StatusCode.INVALID_ARGUMENT, _TOO_LARGE)
        return message

    async def only(self, seconds: float) -> Any:
        """The one message of a unary request; aborts the call if none comes within `seconds`."""
        message = grpc.aio.EOF
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                message = await self.message()
        if message is grpc.aio.EOF:
            await self.context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, _TOO_SLOW)
        return message

    async def answered(self, answering: Any, watches: bool) -> Any:
        """Await a method's answer. watches: the method may stay silent for long."""
        if not watches or self.captions:
            return await answering
        with self.bounds.idle(self.address):
            return await answering


@dataclass(slots=True)
class _Messages:
    """Iterates over a stream's messages without holding any of them."""

    call: _BoundedCall
    service: Service

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = await self.call.message()
        if message is grpc.aio.EOF:
            raise StopAsyncIteration
        if not self.call.captions:
            await asyncio.sleep(self.service.visits.spend(self.call.address, 1))
        return message


def _function(handler: Any) -> Callable[..., Any]:
    kinds = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    return next(kind for kind in kinds if kind is not None)
