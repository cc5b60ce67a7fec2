"""The thread that owns the engine. Everything reaches it through one inbox."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.request import Caption, Sequence
from server.metrics import Metrics

log = logging.getLogger(__name__)


class EngineFailed(VignetteError):
    """The engine broke while it worked on this request; it goes on with the next."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    pixels: np.ndarray
    prompt: str | None
    max_new_tokens: int | None
    done: asyncio.Future[Caption]
    queued_at: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class _Cancel:
    job: _Job


class _Stop:
    """Ends the thread once everything before it in the inbox is done."""


class EngineWorker:
    """Feeds requests of an event loop to an engine, and their captions back."""

    def __init__(self, open_engine: Callable[[], Engine], metrics: Metrics) -> None:
        self.running = 0  # sequences in a slot after the last step
        self._open_engine = open_engine
        self._metrics = metrics
        self._inbox: queue.SimpleQueue[_Job | _Cancel | _Stop] = queue.SimpleQueue()
        self._jobs: dict[Sequence, _Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._opened: asyncio.Future[Engine]
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> Engine:
        """Open the engine in its thread and wait until it is warm; raises what opening raises."""
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._thread.start()
        return await self._opened

    async def caption(
        self, pixels: np.ndarray, prompt: str | None, max_new_tokens: int | None
    ) -> Caption:
        """Queue one image and wait for its caption.

        Cancelling the awaiting task takes the request out of queue or batch. Raises InvalidRequest
        for what does not fit, EngineFailed when the engine broke.
        """
        job = _Job(pixels, prompt, max_new_tokens, self._loop.create_future())
        self._inbox.put(job)
        try:
            return await job.done
        except asyncio.CancelledError:
            self._inbox.put(_Cancel(job))
            raise

    async def stop(self, seconds: float) -> None:
        """Finish what is in the inbox and end the thread; give up after so many seconds."""
        if self._thread.is_alive():
            self._inbox.put(_Stop())
            await asyncio.to_thread(self._thread.join, seconds)

    # --- the engine's thread ------------------------------------------------------------------
    # It must outlive every request: what one of them raises is told to the one who waits for it.

    def _run(self) -> None:
        try:
            engine = self._open_engine()
        except Exception as error:  # of any kind, as said above
            self._tell(self._opened, error=error)
            return
        self._tell(self._opened, engine)
        stopping = False
        while not (stopping and engine.scheduler.idle):
            stopping = self._take_in(engine, stopping)
            if not engine.scheduler.idle:
                self._step(engine)
            self.running = len(engine.scheduler.running)

    def _take_in(self, engine: Engine, stopping: bool) -> bool:
        """Empty the inbox, waiting for something only if there is nothing else to do.

        Returns whether the thread has been told to stop.
        """
        wait = engine.scheduler.idle and not stopping
        while True:
            try:
                message = self._inbox.get(block=wait)
            except queue.Empty:
                return stopping
            wait = False
            match message:
                case _Stop():
                    stopping = True
                case _Cancel(job):
                    self._cancel(engine, job)
                case _Job():
                    self._submit(engine, message)

    def _submit(self, engine: Engine, job: _Job) -> None:
        try:
            sequence = engine.submit(
                job.pixels, job.prompt, job.max_new_tokens, submitted_at=job.queued_at
            )
        except Exception as error:
            self._tell(job.done, error=error)
        else:
            self._jobs[sequence] = job

    def _cancel(self, engine: Engine, job: _Job) -> None:
        for sequence, candidate in self._jobs.items():
            if candidate is job:
                engine.cancel(sequence)
                del self._jobs[sequence]
                return

    def _step(self, engine: Engine) -> None:
        try:
            finished = engine.step()
        except Exception:
            log.exception("the engine failed in a step; its requests are answered with errors")
            self._abandon(engine)
            return
        report = engine.last_step
        if report.encoded:
            self._metrics.encode_images.observe(report.encoded)
        if report.rows:
            self._metrics.decode_rows.observe(report.rows)
        for sequence in finished:
            self._answer(engine, sequence)

    def _answer(self, engine: Engine, sequence: Sequence) -> None:
        job = self._jobs.pop(sequence)
        try:
            self._tell(job.done, engine.caption(sequence))
        except Exception as error:
            self._tell(job.done, error=error)

    def _abandon(self, engine: Engine) -> None:
        engine.abandon()
        for job in self._jobs.values():
            self._tell(job.done, error=EngineFailed("the engine failed on this batch: try again"))
        self._jobs.clear()

    def _tell(
        self, future: asyncio.Future, result: object = None, error: Exception | None = None
    ) -> None:
        """Settle a future of the event loop from this thread, unless its owner gave up."""

        def settle() -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._loop.call_soon_threadsafe(settle)
