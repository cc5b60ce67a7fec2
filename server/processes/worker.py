"""The engine worker: a process that owns one engine and forms its batches.

The main thread talks to the front-ends, one steps the engine (`runtime.stepper`), and one sends the
supervisor a heartbeat every half second, with the start time of the current step.
"""

import asyncio
import dataclasses
import logging
import sys
from collections import deque
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import zmq
import zmq.asyncio
from msgspec.structs import replace

from runtime.async_engine import AsyncEngine
from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.observer import Observer, StepReport
from runtime.planning.config import EngineConfig
from runtime.request import Completion, FinishReason, GenerationRequest, RequestOutput, Timing
from server.ipc.messages import (
    EngineVerified,
    FailedToStart,
    Output,
    StepFailed,
    WorkerFacts,
    notify_supervisor,
    process_name,
    worker_address,
)
from server.ipc.receiver import Owner, Receiver, RequestTask
from server.models import ServedModel
from server.processes.engine_files import EngineFiles
from server.processes.heartbeat import Heartbeat
from server.settings import Settings
from server.system import follow_parent, give_way
from server.telemetry.logs import configure
from server.telemetry.metrics import WorkerMetrics, count_as

log = logging.getLogger(__name__)

_FAILURES = 2  # consecutive steps that may raise


class Worker(Receiver, Observer):
    """Passes front-ends' requests to an engine, and its outputs back.

    broken: whether the process must be replaced: after a GPU error nothing in it works any more,
    and repeated failures may be due to the process, not the images.
    """

    def __init__(
        self,
        engine: Engine,
        socket: zmq.asyncio.Socket,
        metrics: WorkerMetrics,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """check: see `serve`."""
        super().__init__(socket)
        self._check = check
        self._engine, self._metrics = AsyncEngine(engine), metrics
        self._held: deque[RequestTask] = deque()  # waiting for or behind one that runs alone
        self._alone: int | None = None
        self._failure: Exception | None = None
        self.broken = False
        engine.observer = self
        metrics.graphs.set(engine.runner.graphs)

    @property
    def idle(self) -> bool:
        """Whether the process may end."""
        return self.broken or not (self.jobs or self._held)

    def forget(self, owner: Owner) -> None:
        """Cancel the requests of a front-end that has died, and drop its store."""
        super().forget(owner)
        for job in list(self._held):
            if job.owner == owner:
                self.cancel(job.message.request.id)

    def received(self, job: RequestTask) -> None:
        """Start a request when its turn has come."""
        self._held.append(job)
        self._begin_held()

    def _begin_held(self) -> None:
        """Pass requests to the engine in order; a suspect of any front-end runs alone."""
        while self._held and self._alone is None and not self.broken:
            job = self._held[0]
            if job.message.alone and self.jobs:
                return
            self._held.popleft()
            self._alone = job.message.request.id if job.message.alone else None
            self.begin(job)

    def ended(self, number: int) -> None:
        """Start requests that waited for this one."""
        if self._alone == number:
            self._alone = None
        self._begin_held()

    async def serve(self, job: RequestTask) -> None:
        """Run a request on the engine, and send its outputs to the front-end."""
        request = job.message.request
        try:
            ready = replace(request, pixels=self.pixels(job))
            async with aclosing(self._engine.generate(ready)) as outputs:
                async for output in outputs:
                    self.send(job.owner, Output(output))
        except VignetteError as error:  # e.g. too few slots here; another worker may have more
            log.error("request %d can't be served here", request.id, exc_info=error)
            failed = RequestOutput(
                request.id, Completion((), finish_reason=FinishReason.ERROR), Timing()
            )
            self.send(job.owner, Output(failed))
        except Exception as error:  # ONNX Runtime raises a class of its own for every status code
            self.send(job.owner, StepFailed(request.id))
            self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        if error is not self._failure:  # requests of one step share its error
            message = "the engine failed in a step; its requests are tried one by one"
            log.error(message, exc_info=error)
        self._failure = error
        engine = self._engine.engine
        if engine.runner.on_gpu or engine.stepper.failures > _FAILURES:
            self.broken = True
            self.stop()

    def cancel(self, number: int) -> None:
        """Cancel a request that nobody waits for."""
        super().cancel(number)
        for held in [job for job in self._held if job.message.request.id == number]:
            self._held.remove(held)
        self._begin_held()  # others may have waited behind it

    # --- On the thread that steps -----------------------------------------------------------------

    def admitted(self, requests: list[GenerationRequest]) -> None:
        """Mark requests about to be encoded as started: they are suspects if this process dies."""
        for request in requests:
            job = self.jobs.get(request.id)  # None if it was cancelled at this moment
            store = self.stores.get(job.owner) if job else None
            if job and store:
                store.started[job.message.slot] = request.id

    def stepped(self, report: StepReport) -> None:
        """Update the metrics after a step."""
        if report.encoded:
            self._metrics.encode_images.observe(report.encoded)
        if report.rows:
            self._metrics.decode_rows.observe(report.rows)
        self._metrics.running.set(report.running)
        self._metrics.waiting.set(report.waiting)
        self._check()


def main(settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int) -> None:
    """Entry point of the process: open the model's engine, serve until stopped."""
    follow_parent()
    give_way()
    configure(settings)
    count_as(folder, f"worker-{index}")
    from runtime.execution.loader import prepare  # so that the supervisor loads no ONNX Runtime

    config = dataclasses.replace(settings.engine_config, memory_share=model.memory_share)

    files = EngineFiles(model.engine)

    def open_engine() -> Engine:
        prepared = prepare(model.engine, config)
        prepared.manifest.check_fingerprint(model.engine, model.fingerprint)
        notify_supervisor(folder, process_name("worker", index, epoch), EngineVerified(model.name))
        engine = Engine.start(prepared)
        files.watch(prepared.manifest.files)
        return engine

    sys.exit(serve(open_engine, model.name, folder, index, epoch, files.check))


def serve(
    open_engine: Callable[[], Engine],
    model: str,
    folder: Path,
    index: int,
    epoch: int,
    check: Callable[[], object] = lambda: None,
) -> int:
    """Open the engine, report it as ready, serve until stopped; return the exit status.

    check: called after each step, before its outputs are handed on.
    """
    heartbeat = Heartbeat(zmq.Context(), folder, index, epoch)
    heartbeat.start()
    try:
        engine = open_engine()
    except VignetteError as error:
        # The supervisor, not this process, reports the error, so that it is shown once.
        notify_supervisor(folder, process_name("worker", index, epoch), FailedToStart(str(error)))
        return 1
    metrics = WorkerMetrics(model)
    address = worker_address(folder, index, epoch)
    return asyncio.run(_serve(engine, metrics, heartbeat, address, check))


def _precision(engine: Engine) -> str:
    """The precision, and the text positions if they are others than usual: captions are cut off
    where those end.
    """
    plan, usual = engine.runner.plan, EngineConfig().text_positions(engine.manifest.sizes.text)
    cut = f", {plan.text_tokens} text positions" if plan.text_tokens != usual else ""
    return plan.combination + cut


async def _serve(
    engine: Engine,
    metrics: WorkerMetrics,
    heartbeat: Heartbeat,
    address: str,
    check: Callable[[], object],
) -> int:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 0  # unlimited: a full queue would drop outputs silently
    socket.bind(address)
    worker = Worker(engine, socket, metrics, check)
    facts = WorkerFacts(
        engine=engine.manifest.fingerprint,
        precision=_precision(engine),
        runs_on=engine.runs_on,
        provider=engine.runner.plan.encoder_provider,
        self_test=engine.self_test,
        self_test_seconds=engine.self_test_seconds,
        slots=engine.slots,
        encode_batch=engine.encode_batch,
    )
    heartbeat.serving(worker, engine.stepper, facts)
    await worker.run()
    socket.close(linger=2000)
    return int(worker.broken)
