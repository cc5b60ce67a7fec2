"""The engine worker: a process that owns one engine and forms its batches.

Its main thread talks to the front-ends, one steps the engine (`runtime.stepper`), and one tells the
supervisor every half second that this process lives, and since when the step that it is in has
been running.
"""

import asyncio
import dataclasses
import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import zmq
import zmq.asyncio
from msgspec.structs import replace

from runtime.async_engine import AsyncEngine
from runtime.engine import Engine, Observer, StepReport
from runtime.errors import InvalidRequest, VignetteError
from runtime.request import (
    Completion,
    FinishReason,
    GenerationRequest,
    RequestOutput,
    Timing,
)
from server.ipc.messages import (
    TO_WORKER,
    Cancel,
    FailedToStart,
    Found,
    Generate,
    Hello,
    Message,
    Output,
    StepFailed,
    WorkerFacts,
    packed,
    process_name,
    tell,
    worker_address,
)
from server.ipc.shared import NoSharedMemory, PixelStore
from server.logs import configure
from server.metrics import WorkerMetrics, count_as
from server.models import ServedModel
from server.processes.pulse import Pulse
from server.processes.system import follow_parent, give_way
from server.settings import Settings

log = logging.getLogger(__name__)

_FAILURES = 2  # steps that may raise in a row
Owner = bytes  # identity of the front-end that a message came from


@dataclass(slots=True, eq=False)
class Job:
    """A request, whose it is, and the task that answers it."""

    owner: Owner
    message: Generate
    task: asyncio.Task[None] | None = field(default=None)


class Worker(Observer):
    """Feeds what front-ends send to an engine, and answers them.

    broken: after a GPU's error nothing in this process works any more, and what keeps failing may
    be the process, not the images. The next one starts afresh.
    """

    def __init__(self, engine: Engine, socket: zmq.asyncio.Socket, metrics: WorkerMetrics) -> None:
        self._engine, self._socket, self._metrics = AsyncEngine(engine), socket, metrics
        self._stores: dict[Owner, PixelStore] = {}
        self._jobs: dict[int, Job] = {}  # in the engine, by the ids of their requests
        self._held: deque[Job] = deque()  # behind one that has to run alone
        self._alone: int | None = None
        self._over, self._changed = asyncio.Event(), asyncio.Event()
        self._failure: Exception | None = None
        self.broken = False
        engine.observer = self
        metrics.graphs.set(engine.runner.graphs)

    async def run(self) -> None:
        """Serve until told to stop, then finish what was begun."""
        receiving = asyncio.create_task(self._receive())
        try:
            await self._over.wait()
            while (self._jobs or self._held) and not self.broken:
                self._changed.clear()
                await self._changed.wait()
        finally:
            receiving.cancel()

    def stop(self) -> None:
        """Finish what was begun."""
        self._over.set()

    def forget(self, owner: Owner) -> None:
        """A front-end has died: nobody waits for what it sent."""
        self._stores.pop(owner, None)
        for job in (*self._held, *self._jobs.values()):
            if job.owner == owner:
                self._cancel(job.message.request.id)

    @property
    def step_since(self) -> float | None:
        """When the step that the engine is in began (`time.monotonic`)."""
        return self._engine.engine.stepper.step_since

    async def _receive(self) -> None:
        while True:
            owner, data = await self._socket.recv_multipart()
            match TO_WORKER.decode(data):
                case Hello() as hello:
                    self._open(owner, hello)
                case Generate() as message:
                    self._held.append(Job(owner, message))
                    self._start_held()
                case Cancel() as message:
                    self._cancel(message.id)

    def _open(self, owner: Owner, hello: Hello) -> None:
        try:
            self._stores[owner] = PixelStore(Path(hello.store), hello.slots, hello.shape)
        except (OSError, NoSharedMemory) as cause:  # it has died, and its file is gone
            log.warning("the pixels of %s can't be opened: %s", owner.decode(), cause)

    def _start_held(self) -> None:
        """Hand requests to the engine in their order; a suspect runs alone, whoever sent it."""
        while self._held and self._alone is None:
            job = self._held[0]
            if job.message.alone and self._jobs:
                return
            self._held.popleft()
            number = job.message.request.id
            self._jobs[number] = job
            self._alone = number if job.message.alone else None
            job.task = asyncio.create_task(self._serve(job))
            job.task.add_done_callback(partial(self._ended, number))

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._jobs[number]
        if self._alone == number:
            self._alone = None
        self._start_held()
        self._changed.set()

    async def _serve(self, job: Job) -> None:
        request = job.message.request
        try:
            pixels = self._stores[job.owner][request.pixels]
            async with aclosing(self._engine.generate(replace(request, pixels=pixels))) as outputs:
                async for output in outputs:
                    await self._send(job.owner, Output(output))
        except InvalidRequest as error:  # another worker of its model would have had the slots
            log.error("request %d is refused here: %s", request.id, error)
            failed = RequestOutput(request.id, Completion(()), FinishReason.FAILED, Timing())
            await self._send(job.owner, Output(failed))
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            await self._send(job.owner, StepFailed(request.id))
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        if error is not self._failure:  # else of the same step
            message = "the engine failed in a step; its requests are tried one by one"
            log.error(message, exc_info=error)
        self._failure = error
        engine = self._engine.engine
        if engine.runner.on_gpu or engine.stepper.failures > _FAILURES:
            self.broken = True
            self._over.set()

    def _cancel(self, number: int) -> None:
        if (job := self._jobs.get(number)) is not None and job.task is not None:
            job.task.cancel()
        for held in [job for job in self._held if job.message.request.id == number]:
            self._held.remove(held)
            self._changed.set()

    async def _send(self, owner: Owner, message: Message) -> None:
        await self._socket.send_multipart([owner, packed(message)])

    # --- On the thread that steps -----------------------------------------------------------------

    def admitted(self, requests: list[GenerationRequest]) -> None:
        """If this process dies now, it is because of one of these."""
        for request in requests:
            job = self._jobs.get(request.id)  # None if it was cancelled at this moment
            store = self._stores.get(job.owner) if job else None
            if job and store:
                store.started[job.message.request.pixels] = request.id

    def stepped(self, report: StepReport) -> None:
        """Count what was done."""
        if report.encoded:
            self._metrics.encode_images.observe(report.encoded)
        if report.rows:
            self._metrics.decode_rows.observe(report.rows)
        self._metrics.running.set(report.running)
        self._metrics.waiting.set(report.waiting)


def main(settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int) -> None:
    """The process: open the model's engine, serve until stopped."""
    follow_parent()
    give_way()
    configure(settings)
    count_as(f"worker-{index}")
    from runtime.execution.loader import prepare  # so that the supervisor loads no ONNX Runtime

    config = dataclasses.replace(settings.engine_config, memory_share=model.memory_share)

    def open_engine() -> Engine:
        prepared = prepare(model.engine, config)
        tell(folder, process_name("worker", index, epoch), Found(model.name))
        return Engine.start(prepared)

    sys.exit(serve(open_engine, model.name, folder, index, epoch))


def serve(
    open_engine: Callable[[], Engine], model: str, folder: Path, index: int, epoch: int
) -> int:
    """Open the engine, say so, serve until stopped; returns the exit status."""
    pulse = Pulse(zmq.Context(), folder, index, epoch)
    pulse.start()
    try:
        engine = open_engine()
    except VignetteError as error:
        # The supervisor, not this process, says it: once, and only if nothing serves already.
        tell(folder, process_name("worker", index, epoch), FailedToStart(str(error)))
        return 1
    metrics = WorkerMetrics(model)
    return asyncio.run(_serve(engine, metrics, pulse, worker_address(folder, index, epoch)))


async def _serve(engine: Engine, metrics: WorkerMetrics, pulse: Pulse, address: str) -> int:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 0  # a full queue would drop answers without a word
    socket.bind(address)
    worker = Worker(engine, socket, metrics)
    facts = WorkerFacts(
        engine=engine.manifest.fingerprint,
        precision=engine.runner.precision,
        runs_on=engine.runs_on,
        provider=engine.runner.provider,
        self_test=engine.self_test,
        seconds=engine.seconds,
        device=os.environ.get("CUDA_VISIBLE_DEVICES", "0") if engine.runner.on_gpu else "cpu",
        slots=engine.config.slots or 0,
    )
    pulse.serving(worker, facts)
    await worker.run()
    socket.close(linger=2000)
    return int(worker.broken)
