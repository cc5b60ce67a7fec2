"""A replica of a model's deployment: a worker under a supervisor, called over Ray Serve.

The engine has a process of its own, as on one machine. So the replica survives a crash, and finds
out and reports its cause; a replica that dies with its node proves nothing.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import ray
from msgspec import Struct, msgpack
from msgspec.structs import replace
from ray.exceptions import RayError

from runtime.request import GenerationRequest, RequestOutput
from server.cluster.registry import REPORT_SECONDS, ReplicaReport, registry
from server.ipc.deadline import Expired
from server.ipc.failures import EngineFailed, reason_of
from server.ipc.messages import FailureReason
from server.model_files import ModelFiles
from server.models import ServedModel
from server.processes.supervised_engine import SupervisedEngine
from server.processes.supervisor import CannotStart
from server.settings import Settings
from server.telemetry.logs import configure

log = logging.getLogger(__name__)


class ReplicaRequest(Struct, frozen=True):
    """A request as an ingress sends it, without its pixels.

    seconds: left until its deadline. kind: of the model that the request was made for.
    """

    request: GenerationRequest
    digest: str
    seconds: float | None
    kind: str


class ReplicaOutput(Struct, frozen=True):
    """A replica's reply: an output of a request, or the reason for which there is none.

    engine: identity of the replica's engine (`WorkerFacts.identity`).
    """

    engine: str
    output: RequestOutput | None
    failure: FailureReason | None = None


REQUEST_DECODER, OUTPUT_DECODER = msgpack.Decoder(ReplicaRequest), msgpack.Decoder(ReplicaOutput)


class Replica:
    """Captions for ingresses. Its methods are called by Ray Serve, on one event loop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, model: ServedModel, worker_main: Callable[..., Any], places: int
    ) -> None:
        """places: most requests inside at once.

        Raises EngineFolderError, NoSharedMemory and CannotStart.
        """
        configure(settings)
        self._files = ModelFiles.of(model.engine, model.fingerprint)
        self._engine = SupervisedEngine(settings, model, worker_main, places)
        await self._engine.start()
        self._reporting = asyncio.create_task(self._report())

    async def __del__(self) -> None:
        """End the worker, when Serve ends this replica; all requests have been answered."""
        if not hasattr(self, "_reporting"):
            return  # it could not start
        self._reporting.cancel()
        await self._engine.close()

    def check_health(self) -> None:
        """Raise CannotStart if the replica must be replaced. The supervisor replaces a worker that
        is stuck in a step or has crashed.
        """
        if (failure := self._engine.failure) is not None:
            raise CannotStart(failure)

    def model_files(self) -> bytes:
        """The model's `ModelFiles`, encoded."""
        return msgpack.encode(self._files)

    async def caption(self, message: bytes, *pixels: bytes) -> bytes:
        """The one output of a request that is not streamed. message: an encoded ReplicaRequest.
        pixels: in pieces.
        """
        async with aclosing(self._answers(message, b"".join(pixels))) as news:
            [answer] = [each async for each in news]
        return msgpack.encode(answer)

    async def stream(self, message: bytes, *pixels: bytes) -> AsyncGenerator[bytes, None]:
        """The outputs of a request, as they come."""
        async with aclosing(self._answers(message, b"".join(pixels))) as news:
            async for answer in news:
                yield msgpack.encode(answer)

    async def _answers(self, message: bytes, pixels: bytes) -> AsyncGenerator[ReplicaOutput, None]:
        asked = REQUEST_DECODER.decode(message)
        facts = self._engine.worker.facts
        identity = facts.identity if facts is not None else ""
        if asked.kind != self._files.kind:
            yield ReplicaOutput(identity, None, FailureReason.REPLACED)
            return
        deadline = None if asked.seconds is None else time.perf_counter() + asked.seconds
        scheduling = replace(asked.request.scheduling, deadline=deadline)
        request = replace(asked.request, scheduling=scheduling)
        values = np.frombuffer(pixels, np.uint8)
        try:
            async with aclosing(self._engine.generate(request, asked.digest, values)) as outputs:
                async for output in outputs:
                    yield ReplicaOutput(identity, output)
        except (EngineFailed, Expired) as error:
            yield ReplicaOutput(identity, None, reason_of(error))

    async def _report(self) -> None:
        """Report this replica every other second."""
        context = ray.get_runtime_context()
        reports_to = registry()
        name, node = context.get_actor_id() or "", ray.util.get_node_ip_address()
        while True:
            report = ReplicaReport(name, node, self._files.kind, self._engine.worker)
            try:
                await reports_to.report_replica.remote(msgpack.encode(report))
            except RayError as error:
                log.warning("nobody hears of this replica, for now: %r", error)
            await asyncio.sleep(REPORT_SECONDS)
