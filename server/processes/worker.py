"""The engine worker: a process that owns one engine and forms its batches.

One thread steps the engine and talks to the front-ends; another tells the supervisor every half
second that this process lives, and since when the step that it is in has been running.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import zmq

from runtime.engine import Engine
from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Sequence, Terms
from server.ipc.messages import (
    BEAT_SECONDS,
    Message,
    control_address,
    packed,
    process_name,
    tell,
    unpacked,
    worker_address,
)
from server.ipc.shared import NoSharedMemory, PixelStore
from server.logs import configure
from server.metrics import WorkerMetrics, count_as
from server.processes.system import follow_parent, give_way
from server.settings import Settings

log = logging.getLogger(__name__)

_FAILURES = 2  # steps that may raise in a row
Owner = bytes  # identity of the front-end that a message came from


@dataclass(frozen=True, slots=True)
class Job:
    """A request in the engine: whose it is, by which number they know it, and its pixels' slot."""

    owner: Owner
    number: int
    slot: int = field(default=-1, compare=False)


class Worker:
    """Feeds what front-ends send to an engine, and answers them."""

    def __init__(self, engine: Engine, socket: "zmq.Socket[bytes]", metrics: WorkerMetrics) -> None:
        self._engine, self._socket, self._metrics = engine, socket, metrics
        self._stores: dict[Owner, PixelStore] = {}
        self._jobs: dict[Sequence, Job] = {}
        self._held: deque[tuple[Job, Message]] = deque()  # behind one that has to run alone
        self._alone: Sequence | None = None
        self.gone: queue.SimpleQueue[Owner] = queue.SimpleQueue()  # front-ends that have died
        self._failures = 0  # of steps in a row
        self.step_since: float | None = None
        self.stopping = self.broken = False
        metrics.graphs.set(engine.runner.graphs)

    def run(self) -> None:
        """Serve until told to stop, then finish what was begun."""
        while not (self.stopping and self._idle):
            self._take_in()
            self._submit_held()
            if not self._engine.scheduler.idle:
                self._step()
            scheduler = self._engine.scheduler
            self._metrics.running.set(len(scheduler.running))
            self._metrics.waiting.set(scheduler.waiting)

    @property
    def _idle(self) -> bool:
        return self._engine.scheduler.idle and not self._held

    def _take_in(self) -> None:
        """Take all messages that are there; wait for one only if there is nothing to do."""
        while not self.gone.empty():
            self._forget(self.gone.get())
        wait = 200 if self._idle else 0  # `stopping` comes from outside
        while self._socket.poll(wait):
            owner, data = self._socket.recv_multipart()
            self._handle(owner, unpacked(data))
            wait = 0

    def _handle(self, owner: Owner, message: Message) -> None:
        match message["op"]:
            case "hello":
                store = Path(message["store"]), message["slots"], tuple(message["shape"])
                try:
                    self._stores[owner] = PixelStore(*store)
                except (OSError, NoSharedMemory) as cause:  # it has died, and its file is gone
                    log.warning("the pixels of %s can't be opened: %s", owner.decode(), cause)
            case "caption":
                self._held.append((Job(owner, message["id"], message["slot"]), message))
            case "cancel":
                self._cancel(Job(owner, message["id"]))

    def _submit_held(self) -> None:
        """Hand requests to the engine in their order; a suspect runs alone, whoever sent it."""
        while self._held and self._alone not in self._jobs:
            job, message = self._held[0]
            if message["alone"] and not self._engine.scheduler.idle:
                return
            self._held.popleft()
            self._submit(job, message)

    def _submit(self, job: Job, message: Message) -> None:
        try:
            sequence = self._engine.submit(
                self._stores[job.owner][message["slot"]],
                message["prompt"],
                message["max_new_tokens"],
                terms=Terms(message["queued_at"], message["urgent"], message["deadline"]),
            )
        except Exception as error:
            # Whatever it is, it is told to the one who waits for it: this loop must outlive it.
            self._fail(job, error)
        else:
            self._jobs[sequence] = job
            self._alone = sequence if message["alone"] else None

    def _cancel(self, job: Job) -> None:
        for held in self._held:
            if held[0] == job:
                self._held.remove(held)
                return
        for sequence, candidate in self._jobs.items():
            if candidate == job:
                self._engine.cancel(sequence)
                del self._jobs[sequence]
                return

    def _forget(self, owner: Owner) -> None:
        """A front-end has died: nobody waits for what it sent."""
        self._stores.pop(owner, None)
        self._held = deque(held for held in self._held if held[0].owner != owner)
        for sequence, job in list(self._jobs.items()):
            if job.owner == owner:
                self._engine.cancel(sequence)
                del self._jobs[sequence]

    def _step(self) -> None:
        self.step_since = time.monotonic()
        try:
            finished = self._engine.step(self._note_started)
        except Exception:
            log.exception("the engine failed in a step; its requests are tried one by one")
            self._failures += 1
            if self._engine.runner.on_gpu or self._failures > _FAILURES:
                # After a GPU's error nothing in this process works any more, and what keeps failing
                # may be the process, not the images. The next one starts afresh.
                self.broken = self.stopping = True
                self._engine.abandon()
                return
            self._abandon()
            return
        finally:
            self.step_since = None
        self._failures = 0
        report = self._engine.last_step
        if report.encoded:
            self._metrics.encode_images.observe(report.encoded)
        if report.rows:
            self._metrics.decode_rows.observe(report.rows)
        for sequence in finished:
            self._answer(sequence)

    def _note_started(self, sequences: list[Sequence]) -> None:
        """If this process dies now, it is because of one of these."""
        for sequence in sequences:
            job = self._jobs[sequence]
            self._stores[job.owner].started[job.slot] = job.number

    def _answer(self, sequence: Sequence) -> None:
        job = self._jobs.pop(sequence)
        if sequence.expired:
            self._send(job.owner, {"op": "expired", "id": job.number})
            return
        try:
            caption = asdict(self._engine.caption(sequence))
        except Exception as error:
            self._fail(job, error)
        else:
            self._send(job.owner, {"op": "answer", "id": job.number, "caption": caption})

    def _abandon(self) -> None:
        """A step raised: what it left in the slots is unknown, so all that was inside goes back."""
        self._engine.abandon()
        for job in self._jobs.values():
            self._send(job.owner, {"op": "failed", "id": job.number})
        self._jobs.clear()

    def _fail(self, job: Job, error: Exception) -> None:
        if not isinstance(error, VignetteError):
            log.error("a request failed", exc_info=error)
        elif not isinstance(error, InvalidRequest):
            log.warning("a request failed: %s", error)
        kind = "invalid_request" if isinstance(error, InvalidRequest) else "internal"
        self._send(
            job.owner, {"op": "error", "id": job.number, "kind": kind, "message": str(error)}
        )

    def _send(self, owner: Owner, message: Message) -> None:
        self._socket.send_multipart([owner, packed(message)])


class Pulse(threading.Thread):
    """Tells the supervisor that this process lives, and hears from it when to stop."""

    def __init__(self, context: zmq.Context, folder: Path, index: int, epoch: int) -> None:
        super().__init__(name="pulse", daemon=True)
        self._socket = context.socket(zmq.DEALER)
        self._socket.identity = process_name("worker", index, epoch).encode()
        self._socket.linger = 1000
        self._address = control_address(folder)
        self._ready: Message | None = None
        self.worker: Worker | None = None

    def serving(self, worker: Worker, facts: Message) -> None:
        """From now on the worker serves; `facts` are for people and front-ends."""
        self.worker, self._ready = worker, {"op": "ready", **facts}

    def run(self) -> None:
        """Beat until the process ends."""
        self._socket.connect(self._address)
        told = False
        while True:
            if self._ready is not None and not told:
                self._socket.send(packed(self._ready))
                told = True
            since = self.worker.step_since if self.worker else None
            self._socket.send(packed({"op": "beat", "step_since": since}))
            if self._socket.poll(BEAT_SECONDS * 1000):
                message = unpacked(self._socket.recv())
                if message["op"] == "stop" and self.worker is not None:
                    self.worker.stopping = True
                elif message["op"] == "gone" and self.worker is not None:
                    self.worker.gone.put(message["name"].encode())


def main(settings: Settings, folder: Path, index: int, epoch: int) -> None:
    """The process: open the engine that the settings name, serve until stopped."""
    follow_parent()
    give_way()
    configure(settings)
    count_as(f"worker-{index}")
    from runtime.execution.loader import (
        prepare,  # here, so that the supervisor loads no ONNX Runtime
    )

    def open_engine() -> Engine:
        prepared = prepare(settings.engine, settings.engine_config)
        tell(folder, process_name("worker", index, epoch), {"op": "found"})
        return Engine.start(prepared)

    sys.exit(serve(open_engine, folder, index, epoch))


def serve(open_engine: Callable[[], Engine], folder: Path, index: int, epoch: int) -> int:
    """Open the engine, say so, serve until stopped; returns the exit status."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = socket.rcvhwm = 0  # a full queue would drop answers without a word
    socket.bind(worker_address(folder, index, epoch))
    pulse = Pulse(context, folder, index, epoch)
    pulse.start()
    try:
        engine = open_engine()
    except VignetteError as error:
        # The supervisor, not this process, says it: once, and only if nothing serves already.
        tell(folder, process_name("worker", index, epoch), {"op": "failed", "message": str(error)})
        return 1
    worker = Worker(engine, socket, WorkerMetrics())
    pulse.serving(
        worker,
        {
            "pid": os.getpid(),
            **engine.identity,
            "runs_on": engine.runs_on,
            "provider": engine.runner.provider,
            "self_test": engine.self_test,
            "seconds": engine.seconds,
            "device": _device(engine),
            "slots": engine.config.slots,
        },
    )
    worker.run()
    socket.close(linger=2000)
    return int(worker.broken)


def _device(engine: Engine) -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") if engine.runner.on_gpu else "cpu"
