"""What a call may do to others: who makes it, how many it has, how often it asks."""

import asyncio
import inspect
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import unquote

import grpc

from runtime.errors import VignetteError
from runtime.request import Timing
from server.addresses import address_of, group_of, networks
from server.errors import INTERNAL, ErrorStatus, answer_to
from server.service.keys import sent
from server.service.model import Model
from server.service.service import Service

Context = Any  # grpc.aio.ServicerContext, which has no types
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_COPIES = 2  # of a message's images: its own, and those that are taken from it
_LEAST_MS = 100  # of a deadline: less is spent on the way
_EACH = 256  # calls that one address has at once
_SMALL = 64 * 1024  # bytes
_LARGEST = 4096  # bytes of a message that is not to caption
_TOO_MANY = "too_many_calls: this address has, or makes, more calls than one may: wait for answers"
_TOO_LARGE = "invalid_request: the message is larger than this method takes"


class Refusal:
    """How a call is refused, without the error: that would hold the message as long as it lives."""

    def __init__(self, error: VignetteError) -> None:
        answer: ErrorStatus = answer_to(error, 500)
        retry_after = getattr(error, "retry_after", None)
        self.trailing = (("retry-after", str(retry_after)),) if retry_after is not None else ()
        self.message = f"{answer.code}: {answer.message or error}"
        self.status = _STATUS.get(answer.status, grpc.StatusCode.UNKNOWN)


def _metadata(context: Context) -> dict[str, Any]:
    return {key.lower(): value for key, value in context.invocation_metadata() or ()}


def address_in(service: Service, context: Context) -> str:
    """Whom a call is from."""
    peer = unquote(context.peer()).partition(":")[2]  # ipv4:1.2.3.4:5, ipv6:[::1]:5
    forwarded = str(_metadata(context).get("x-forwarded-for", ""))
    return group_of(address_of(peer, forwarded, networks(service.settings.trusted_proxies)))


class Call:
    """One call that is to caption: who makes it, and how it ended."""

    def __init__(self, service: Service, context: Context, method: str) -> None:
        self.service, self._context, self._method = service, context, method
        self._metadata, self._began = _metadata(context), time.perf_counter()
        self.model = self.id = ""
        self.images = 1
        self.timing: Timing | None = None  # of its caption, once that is there
        self.key: str | None = None
        self._address = address_in(service, context)

    @property
    def client(self) -> str:
        """With whom it shares its turns."""
        return self.key or self._address

    @property
    def timeout_ms(self) -> int | None:
        """What is left of its deadline."""
        left = self._context.time_remaining()
        longest = self.service.settings.timeout_seconds
        if left is None or left > longest:
            return None
        return max(_LEAST_MS, math.floor(left * 1e3))

    def asks(self, request: Any) -> Model:
        """The model that is to caption. Raises UnknownModel."""
        self.id = request.id
        model = self.service.model(request.model_name)
        self.model = model.name
        return model

    def enter(self, held: ExitStack) -> None:
        """Count a caption among those of its key. Raises Unauthorised or TooFast."""
        if self.service.keys is not None:
            self.key = held.enter_context(self.service.keys.enter(sent(self._metadata)))

    @contextmanager
    def held(self, size: int) -> Iterator[ExitStack]:
        """Hold a place and the message's bytes while the call is served, and count how it ended.

        Raises what refuses it.
        """
        with ExitStack() as held:
            try:
                self.enter(held)
                self.service.check_room(self.client)
                client = self.client
                size *= _COPIES
                self.service.budget.hold(size, client)
                held.callback(self.service.budget.let_go, size, client)
                yield held
            except VignetteError as error:
                self._outcome(answer_to(error, 500).code)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                self._outcome("cancelled")
                raise
            except Exception:
                self._outcome(INTERNAL.code)
                raise
            self._outcome("ok")

    def _outcome(self, code: str) -> None:
        self.service.count(self.model, self.key, code)
        if self.service.tracer is not None:
            stages = {} if self.timing is None else self.timing.stages
            total = time.perf_counter() - self._began
            self.service.tracer.record(self._method, self._metadata, code, stages, total, self.id)

    async def wait_for(self, size: int) -> None:
        """Wait until this client may have sent so many bytes; small messages are free."""
        if size > _SMALL:
            await asyncio.sleep(self.service.intake.spend(self.client, size))

    async def wait_turn(self, images: int = 1) -> None:
        """Wait until this client may be refused so many images."""
        await asyncio.sleep(self.service.refusals.spend(self.client, images))

    async def refuse(self, refusal: Refusal, images: int = 1) -> None:
        """End the call with an error, when it is this client's turn to be refused."""
        await self.wait_turn(images)
        await self._context.abort(refusal.status, refusal.message, refusal.trailing)


class Bounds(grpc.aio.ServerInterceptor):
    """Each address has so many calls at once, and so many a second that are not to caption."""

    def __init__(self, service: Service, captioning: frozenset[str]) -> None:
        """captioning: full names of methods that have bounds of their own."""
        self._service, self._captioning = service, captioning
        self._calls: Counter[str] = Counter()

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call, within bounds."""
        handler = await continuation(details)
        if handler is None:
            return None
        free = details.method in self._captioning
        if handler.response_streaming and inspect.isasyncgenfunction(_function(handler)):
            return _with(handler, self._streaming(_function(handler)))
        return _with(handler, self._answering(_function(handler), free))

    def _answering(self, function: Callable[..., Any], free: bool) -> Callable[..., Any]:
        async def bounded(request: Any, context: Context) -> Any:
            address = address_in(self._service, context)
            with self._place(address) as place:
                if not place or not (free or self._may_ask(address)):
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
                if not free and request.ByteSize() > _LARGEST:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _TOO_LARGE)
                return await function(request, context)

        return bounded

    def _streaming(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def paced(
            requests: AsyncIterator[Any], address: str, context: Context
        ) -> AsyncIterator[Any]:
            async for request in requests:
                if request.ByteSize() > _LARGEST:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _TOO_LARGE)
                await asyncio.sleep(self._service.visits.spend(address, 1))
                yield request

        async def bounded(requests: Any, context: Context) -> AsyncIterator[Any]:
            address = address_in(self._service, context)
            with self._place(address) as place:
                if not place:
                    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, _TOO_MANY)
                async for answer in function(paced(requests, address, context), context):
                    yield answer

        return bounded

    def _may_ask(self, address: str) -> bool:
        return not self._service.visits.spend(address, 1)

    @contextmanager
    def _place(self, address: str) -> Iterator[bool]:
        """Whether there was one."""
        self._calls[address] += 1
        try:
            yield self._calls[address] <= _EACH
        finally:
            self._calls[address] -= 1
            if not self._calls[address]:
                del self._calls[address]


_MAKERS = {  # by whether requests and answers stream
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _function(handler: Any) -> Callable[..., Any]:
    kinds = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    return next(kind for kind in kinds if kind is not None)


def _with(handler: Any, function: Callable[..., Any]) -> Any:
    make = _MAKERS[handler.request_streaming, handler.response_streaming]
    return make(function, handler.request_deserializer, handler.response_serializer)
