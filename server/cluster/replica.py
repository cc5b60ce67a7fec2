"""A replica of a model's deployment: a worker under a supervisor, asked by doors through Ray Serve.

The engine has a process of its own, as on one machine. So the replica survives a crash, and finds
out and reports its cause; a replica that dies with its node proves nothing.
"""

import asyncio
import itertools
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

from runtime.model import manifest as manifests
from runtime.request import GenerationRequest, RequestOutput
from server.cluster.card import Card
from server.cluster.notices import TELL_SECONDS, ReplicaNotice, notices
from server.ipc.dispatcher import Deadly, EngineFailed, Expired
from server.ipc.messages import Serving, Why, process_name
from server.ipc.shared import PixelStore, RunFolder
from server.ipc.transport import Workers
from server.logs import configure
from server.models import ServedModel
from server.processes.crew import workers
from server.processes.supervisor import CannotStart, Supervisor
from server.settings import Settings

log = logging.getLogger(__name__)

_FAILED_STARTS = 3  # of the worker in a row, after which the replica is replaced


class ReplicaRequest(Struct, frozen=True):
    """A request as a door sends it, without its pixels.

    seconds: left until its deadline. kind: of the model that the request was made for.
    """

    request: GenerationRequest
    digest: str
    seconds: float | None
    kind: str


class ReplicaOutput(Struct, frozen=True):
    """A replica's reply: an output of a request, or the reason why there is none.

    engine: identity of the replica's engine (`WorkerFacts.identity`).
    """

    engine: str
    output: RequestOutput | None
    why: Why | None = None


REQUEST_DECODER, OUTPUT_DECODER = msgpack.Decoder(ReplicaRequest), msgpack.Decoder(ReplicaOutput)


class Replica:
    """Captions for doors. Its methods are called by Ray Serve, on one event loop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, model: ServedModel, worker_main: Callable[..., Any], places: int
    ) -> None:
        """places: most requests inside at once.

        Raises EngineFolderError, NoSharedMemory and CannotStart.
        """
        configure(settings)
        self._model = model
        self._card = Card.of(model.engine)
        self._numbers = itertools.count(1)
        folder = RunFolder()
        name = process_name("front", 0, 1)
        self._store = PixelStore(
            folder.path / f"{name}.pixels", places, manifests.read(model.engine).sizes.pixels, True
        )
        self._free = asyncio.Semaphore(places)
        self._links = Workers(folder.path, self._store, name)
        self._children = workers(settings, [model], folder.path, worker_main, [""])
        supervisor = Supervisor(settings, [model.name], folder, self._children, [])
        supervisor.on_change = self._changed
        self._stop, ready = asyncio.Event(), asyncio.Event()
        supervisor.on_ready = ready.set
        self._running = asyncio.create_task(supervisor.run(self._stop))
        starting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._running, starting}, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        if self._running.done():
            self._running.result()
            raise CannotStart("the replica's worker ended as it started: see the log")
        self._telling = asyncio.create_task(self._tell())

    async def __del__(self) -> None:
        """End the worker, when Serve ends this replica; all requests have been answered."""
        self._telling.cancel()
        self._stop.set()
        await self._links.close()
        await self._running

    def check_health(self) -> None:
        """Raise CannotStart if the replica must be replaced. The supervisor replaces a worker that
        is stuck in a step or has crashed.
        """
        if self._running.done():
            raise CannotStart("the replica's supervisor has ended: see the log")
        if any(child.failures >= _FAILED_STARTS for child in self._children):
            raise CannotStart("the replica's worker does not start any more: see the log")

    def card(self) -> bytes:
        """The model's `Card`, encoded."""
        return msgpack.encode(self._card)

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
        request = REQUEST_DECODER.decode(message)
        [child] = self._children
        identity = child.facts.identity if child.facts is not None else ""
        if request.kind != self._card.kind:
            yield ReplicaOutput(identity, None, Why.REPLACED)
            return
        try:
            async with aclosing(self._outputs(request, pixels)) as outputs:
                async for output in outputs:
                    yield ReplicaOutput(identity, output)
        except Deadly:
            yield ReplicaOutput(identity, None, Why.DEADLY)
        except EngineFailed:
            yield ReplicaOutput(identity, None, Why.UNLUCKY)
        except Expired:
            yield ReplicaOutput(identity, None, Why.EXPIRED)

    async def _outputs(
        self, asked: ReplicaRequest, pixels: bytes
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of the request under a new id: ids of different doors may coincide."""
        now = time.perf_counter()
        deadline = None if asked.seconds is None else now + asked.seconds
        scheduling = replace(asked.request.scheduling, arrival_time=now, deadline=deadline)
        self._links.dispatcher.check(asked.digest)
        async with self._free:
            slot = self._store.take()
            try:
                self._store[slot].reshape(-1)[:] = np.frombuffer(pixels, np.uint8)
                request = replace(
                    asked.request, pixels=slot, scheduling=scheduling, id=next(self._numbers)
                )
                generated = self._links.dispatcher.generate(request, asked.digest)
                async with aclosing(generated) as outputs:
                    async for output in outputs:
                        yield output
            finally:
                self._store.give_back(slot)

    def _changed(self, serving: Serving) -> None:
        ready = {(w.index, w.epoch) for w in serving.workers if w.state == "ready"}
        self._links.update(ready, {w.index: w.last_end for w in serving.workers})

    async def _tell(self) -> None:
        """Send a notice of this replica every other second."""
        context = ray.get_runtime_context()
        told = notices()
        name, node = context.get_actor_id() or "", ray.util.get_node_ip_address()
        while True:
            [child] = self._children
            notice = ReplicaNotice(name, node, self._card.kind, child.public())
            try:
                await told.replica.remote(msgpack.encode(notice))
            except RayError as error:
                log.warning("nobody hears of this replica, for now: %r", error)
            await asyncio.sleep(TELL_SECONDS)
