"""A captioning call: its client, its limits and its refusal."""

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import unquote

import grpc

from runtime.errors import VignetteError
from runtime.request import Timing
from server.addresses import address_of, group_of, networks
from server.protocols.errors import INTERNAL, ErrorStatus, answer_to
from server.protocols.kserve import model_of
from server.refusals import RetryLater
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
_COPIES = 2  # of a message's images: in the message, and copied out of it
_LEAST_MS = 100  # the shortest deadline, as less is lost on the way
_SMALL = 64 * 1024  # bytes of a message that has no rate limit


class Refusal:
    """How a call is refused, without the error, which would keep the message alive."""

    def __init__(self, error: VignetteError) -> None:
        answer: ErrorStatus = answer_to(error)
        self.trailing: tuple[tuple[str, str], ...] = ()
        if isinstance(error, RetryLater):
            self.trailing = (("retry-after", str(error.retry_after)),)
        self.message = f"{answer.code}: {answer.message or error}"
        self.status = _STATUS.get(answer.status, grpc.StatusCode.UNKNOWN)


def _metadata(context: Context) -> dict[str, Any]:
    return {key.lower(): value for key, value in context.invocation_metadata() or ()}


def address_in(service: Service, context: Context) -> str:
    """The address group that a call comes from."""
    peer = unquote(context.peer()).partition(":")[2]  # ipv4:1.2.3.4:5, ipv6:[::1]:5
    forwarded = str(_metadata(context).get("x-forwarded-for", ""))
    return group_of(address_of(peer, forwarded, networks(service.settings.trusted_proxies)))


class Call:
    """A captioning call: its client, and how it ended."""

    def __init__(self, service: Service, context: Context, method: str) -> None:
        self.service, self._context, self._method = service, context, method
        self._metadata, self._began = _metadata(context), time.perf_counter()
        self.model = self.id = ""
        self.images = 1
        self.timing: Timing | None = None  # of the caption, once there is one
        self.key: str | None = None
        self._address = address_in(service, context)
        self._keys = service.keys  # as they were when the call came

    @property
    def client(self) -> str:
        """The client for fairness and rate limits: its API key's name, or its address group."""
        return self.key or self._address

    @property
    def timeout_ms(self) -> int | None:
        """Milliseconds left of the call's deadline; None without one before the server's own."""
        left = self._context.time_remaining()
        longest = self.service.settings.timeout_seconds
        if left is None or left > longest:
            return None
        return max(_LEAST_MS, math.floor(left * 1e3))

    def asks(self, request: Any) -> Model:
        """Note the request's id and model, and return the model. Raises UnknownModel."""
        self.id = request.id
        model = model_of(self.service, request.model_name, request.model_version)
        self.model = model.name
        return model

    def enter(self, held: ExitStack, count: int = 1, before: int = 0) -> None:
        """Count captions against their API key. before: those of the call that count already.

        Raises as `Keys.enter`.
        """
        if self._keys is not None and count:
            entered = self._keys.enter(sent(self._metadata), count, before)
            self.key = held.enter_context(entered)

    @contextmanager
    def held(self, size: int) -> Iterator[ExitStack]:
        """Hold a place and the message's bytes while the call is served, and count how it ended.

        Raises the error that refuses it.
        """
        with ExitStack() as held:
            try:
                self.enter(held)
                self.service.check_room(self.client)
                client = self.client
                size *= _COPIES
                self.service.budget.hold(size, client)
                held.callback(self.service.budget.release, size, client)
                yield held
            except VignetteError as error:
                self._outcome(answer_to(error).code)
                raise
            except (asyncio.CancelledError, GeneratorExit):
                self.service.rates.was_abandoned(self.client, self.images)
                self._outcome("cancelled")
                raise
            except Exception:
                self._outcome(INTERNAL.code)
                raise
            self.service.rates.was_served(self.client)
            self._outcome("ok")

    def _outcome(self, code: str) -> None:
        self.service.count(self.model, self.key, code)
        if self.service.tracer is not None:
            stages = {} if self.timing is None else self.timing.stages
            total = time.perf_counter() - self._began
            self.service.tracer.record(self._method, self._metadata, code, stages, total, self.id)

    async def wait_for(self, size: int) -> None:
        """Apply the client's limit on bytes a second, which exempts small messages, and the delay
        for its abandoned and refused requests. size: bytes.
        """
        wait = self.service.rates.uploads.spend(self.client, size) if size > _SMALL else 0.0
        await asyncio.sleep(max(wait, self.service.rates.owed(self.client)))

    async def wait_turn(self, images: int = 1) -> None:
        """Apply the client's rate limit for refusals. images: how many are refused."""
        await asyncio.sleep(self.service.rates.refusals.spend(self.client, images))

    async def refuse(self, refusal: Refusal, images: int = 1) -> None:
        """End the call with an error, after the client's rate limit for refusals."""
        await self.wait_turn(images)
        await self._context.abort(refusal.status, refusal.message, refusal.trailing)
