"""An engine in a worker process under a supervisor, for a program that has no front-ends.

The worker is replaced when it crashes or is stuck, and its requests are tried again as
`server.ipc.dispatcher` says.
"""

import asyncio
import atexit
import itertools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
from msgspec.structs import replace

from runtime.model import manifest as manifests
from runtime.request import GenerationRequest, RequestOutput
from server.ipc.messages import Serving, WorkerState, process_name
from server.ipc.shared import PixelStore, RunFolder
from server.ipc.transport import WorkerLinks
from server.models import ServedModel
from server.processes.children import workers
from server.processes.devices import devices_of_workers
from server.processes.supervisor import CannotStart, Supervisor
from server.settings import Settings

_FAILED_STARTS = 3  # of the worker in a row, after which the engine is given up


class SupervisedEngine:
    """Generates for tasks of the event loop that it was started on.

    lost: set once the engine is given up, for the reason `failure`.
    """

    def __init__(
        self, settings: Settings, model: ServedModel, worker_main: Callable[..., Any], places: int
    ) -> None:
        """worker_main: entry point of the worker, such as `worker.main`. places: most requests
        inside at once; further ones wait.

        Raises EngineFolderError, NoSharedMemory, and what `devices_of_workers` raises.
        """
        devices = devices_of_workers(settings)[:1]
        shape = manifests.read(model.engine).sizes.pixels
        folder, name = RunFolder(), process_name("front", 0, 1)
        try:
            self._store = PixelStore(folder.path / f"{name}.pixels", places, shape, create=True)
        except BaseException:
            folder.remove()
            raise
        self._free, self._numbers = asyncio.Semaphore(places), itertools.count(1)
        self._links = WorkerLinks(folder.path, self._store, name)
        [self._worker] = children = workers(settings, [model], folder.path, worker_main, devices)
        self._supervisor = Supervisor(settings, [model.name], folder, children, [])
        self._running: asyncio.Task[None] | None = None
        self._identity: str | None = None  # of the first worker
        self._differs: str | None = None
        self.lost = asyncio.Event()

    async def start(self) -> None:
        """Start the worker. Raises CannotStart, with the reason, and NoSharedMemory."""
        ready = asyncio.Event()
        self._supervisor.on_ready, self._supervisor.on_change = ready.set, self._changed
        atexit.register(self._worker.kill)  # multiprocessing would wait for it for ever
        self._running = asyncio.create_task(self._supervisor.run(asyncio.Event()))
        self._running.add_done_callback(lambda _: self.lost.set())
        starting = asyncio.create_task(ready.wait())
        try:
            await asyncio.wait({self._running, starting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            starting.cancel()
        if self._running.done():
            self._running.result()
            raise CannotStart("the engine's worker ended as it started: see the log")

    async def close(self) -> None:
        """End the worker; requests that are left never end."""
        await self._links.close()
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        atexit.unregister(self._worker.kill)

    @property
    def worker(self) -> WorkerState:
        """State of the worker."""
        return self._worker.worker_state()

    @property
    def failure(self) -> str | None:
        """Why no worker will serve any more, or None."""
        if self._running is not None and self._running.done():
            return "the engine's supervisor has ended: see the log"
        if self._differs is not None:
            return self._differs
        if self._worker.failures >= _FAILED_STARTS:
            return "the engine's worker does not start any more: see the log"
        return None

    async def generate(
        self, request: GenerationRequest, digest: str, pixels: np.ndarray
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs; closing cancels the request.

        The request gets a new id, unique here. digest: of its images. pixels: uint8 of any shape
        with the model's number of values. Raises what `Dispatcher.generate` raises.
        """
        dispatcher = self._links.dispatcher
        dispatcher.check(digest)
        async with self._free:
            slot = self._store.take()
            try:
                self._store[slot].reshape(-1)[:] = pixels.reshape(-1)
                scheduling = replace(request.scheduling, arrival_time=time.perf_counter())
                ready = replace(request, scheduling=scheduling, id=next(self._numbers))
                async with aclosing(dispatcher.generate(ready, slot, digest)) as outputs:
                    async for output in outputs:
                        yield output
            finally:
                self._store.give_back(slot)

    def _changed(self, serving: Serving) -> None:
        for facts in (w.runs for w in serving.workers if w.runs is not None):
            self._identity = self._identity or facts.identity
            if facts.identity != self._identity:
                self._differs = (
                    f"the engine's worker was replaced and would run {facts.identity} now, not "
                    f"{self._identity}: has plan.json changed? start again"
                )
        self._links.update(() if self._differs else serving.workers)
        if self.failure is not None:
            self.lost.set()
