"""The supervisor: starts the processes, watches them, replaces them, and ends them in order.

A process is replaced when it has ended, when it sends no heartbeat for some seconds (hung), or when
an engine worker is in one step for too long (stuck). A process that had served is replaced at once,
one that fails as it starts after a pause that doubles each time.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence

import zmq
import zmq.asyncio

from runtime.errors import VignetteError
from server.ipc.dispatcher import QUARANTINE_SECONDS
from server.ipc.messages import (
    TO_SUPERVISOR,
    Beat,
    Drain,
    Drained,
    EngineVerified,
    FailedToStart,
    FrontEndLost,
    FrontEndReady,
    FrontEndServes,
    Message,
    Refused,
    Serving,
    Stop,
    WorkerFacts,
    WorkerReady,
    WorkerState,
    control_address,
    packed,
)
from server.ipc.remembered import Remembered
from server.ipc.shared import RunFolder
from server.processes.child import Child, Problem
from server.processes.ports import Ports
from server.service import keys
from server.settings import Settings
from server.telemetry import metrics

log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.1
_FROZEN_SECONDS = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_STOP_SECONDS = 5.0
_DELETED = (
    "was deleted while it was in use: start the service again (systemd's RemoveIPC= deletes what a "
    "user has in /dev/shm when the last session ends: run the service as a system user)"
)


class CannotStart(VignetteError):
    """The service could not start; the message says why."""


class Supervisor:
    """One run of the service, or of a part of it.

    on_ready: called once all models and front-ends serve. on_change: called with each `Serving`
    that front-ends are sent. elsewhere: engine workers that are not processes of this run.
    """

    def __init__(
        self,
        settings: Settings,
        models: Sequence[str],
        run: RunFolder,
        workers: list[Child],
        front_ends: list[Child],
        ports: Ports | None = None,
    ) -> None:
        """models: their names. The folder is removed and the ports are closed in the end."""
        self._settings, self._draining, self._over = settings, False, asyncio.Event()
        self._failure: str | None = None
        self._reading = 0  # number of API key reloads
        self._reading_keys = asyncio.Lock()
        self._announced = self._stopping = False
        self._run, self._folder, self._ports = run, run.path, ports
        self._workers, self._all_front_ends = workers, front_ends
        self._front_ends: list[Child] = []  # started once all engines are complete
        self._verified_models: set[str] = set()  # models whose engine was found complete
        self.refused = {model: Remembered(QUARANTINE_SECONDS) for model in models}
        self.elsewhere: tuple[WorkerState, ...] = ()
        self.on_ready: Callable[[], object] = lambda: None
        self.on_change: Callable[[Serving], object] = lambda serving: None
        self._control = zmq.asyncio.Context.instance().socket(zmq.ROUTER)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until told to stop. Raises NoSharedMemory or CannotStart."""
        try:
            front_ends = [child.stable_name for child in self._all_front_ends]
            workers = [child.stable_name for child in self._workers]
            path = self._settings.api_keys
            known = keys.copy(path, self._folder) if path and self._all_front_ends else 0
            metrics.make_files(self._folder, front_ends, workers, known, len(self.refused))
            self._control.bind(control_address(self._folder))
            await self._serve(stop)
        finally:
            self._kill_all()
            self._control.close(linger=0)
            self._close_ports()
            self._run.remove()

    async def learn(
        self, elsewhere: tuple[WorkerState, ...], refused: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Update the workers elsewhere, and add the images refused there, with expiry times."""
        news = elsewhere != self.elsewhere
        self.elsewhere = elsewhere
        for model, digests in refused.items():
            for digest, until in digests.items():
                if digest not in self.refused[model]:
                    self.refused[model].add(digest, until)
                    news = True
        if news:
            await self._tell_front_ends()
            self._announce()

    async def _serve(self, stop: asyncio.Event) -> None:
        for child in self._workers:
            child.start()
        if not self._workers:
            self._open_front_ends()
        hearing = asyncio.create_task(self._hear())
        watching = asyncio.create_task(self._watch())
        stopping = asyncio.create_task(stop.wait())
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait(
                {stopping, over, hearing, watching}, return_when=asyncio.FIRST_COMPLETED
            )
            for failed in (hearing, watching):
                if failed.done():
                    failed.result()
            if self._failure is not None:
                raise CannotStart(self._failure)
            await self._drain()
        finally:
            for task in (hearing, watching, stopping, over):
                task.cancel()

    # --- Processes --------------------------------------------------------------------------------

    def _open_front_ends(self) -> None:
        self._front_ends = self._all_front_ends
        for child in self._front_ends:
            child.start()

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if now - last > _FROZEN_SECONDS:  # all processes were suspended
                for child in [*self._workers, *self._front_ends]:
                    child.heard_at = now
                    child.step_since = None
            last = now
            if not self._run.present:
                self._failure = f"{self._folder} {_DELETED}"
                self._over.set()
                return
            for child in [*self._workers, *self._front_ends]:
                if self._stopping and child.kind == "worker":
                    if child.health_problem(now, self._settings.step_seconds):
                        child.kill()  # nobody waits for it any more
                elif child.state == "down":
                    if now >= child.start_at:
                        await self._start_again(child)
                elif child.state != "over" and (
                    reason := child.health_problem(now, self._settings.step_seconds)
                ):
                    await self._replace(child, reason)

    async def _start_again(self, child: Child) -> None:
        try:
            child.start()
        except OSError as cause:  # too many files, processes or too little memory, for now
            log.error("%s can't be started: %s", child.stable_name, cause)
            child.failures += 1
            _pause(child)
            await self._tell_front_ends()

    async def _replace(self, child: Child, reason: Problem) -> None:
        assert child.process is not None
        served = child.state == "ready"
        pid, code = child.process.pid, child.process.exitcode
        child.note_end(reason)
        child.kill()
        metrics.forget_gauges(self._folder, child.stable_name)
        if child.kind == "front":
            for pixels in self._folder.glob(f"{child.name}.*.pixels"):
                pixels.unlink()
            for worker in self._workers:
                if worker.state == "ready":
                    await self._send(worker, FrontEndLost(child.name))
        if self._draining and child.kind == "front":
            child.state = "over"
            return
        log.error("%s (pid %s, exit code %s) %s: it is replaced", child.name, pid, code, reason)
        child.failures = 0 if served else child.failures + 1
        _pause(child)
        if child.kind == "worker":
            await self._tell_front_ends()
        if not self._announced and child.failures > 1:
            self._failure = self._failure or f"no {child.kind} process stays up: see the log"
            self._over.set()

    async def read_keys(self) -> None:
        """Have all front-ends reload the file of API keys, if it is valid; the newest content comes
        last, however many ask at once.
        """
        async with self._reading_keys:
            if not self._draining:
                await self._read_keys()

    async def _read_keys(self) -> None:
        path = self._settings.api_keys
        if path is None:
            log.warning("SIGHUP reads the API keys again, and there are none (--api-keys)")
            return
        try:
            # On a thread: it may be on a disk that hangs.
            known = await asyncio.to_thread(keys.copy, path, self._folder)
        except (VignetteError, OSError) as error:
            log.error("the API keys stay as they were: %s", error)
            return
        self._reading += 1
        log.info("%s was read again: %d API keys", path, known)
        await self._tell_front_ends()

    # --- Messages ---------------------------------------------------------------------------------

    async def _hear(self) -> None:
        while True:
            sender, data = await self._control.recv_multipart()
            child = self._of(sender.decode())
            match TO_SUPERVISOR.decode(data):
                case FailedToStart(reason) if not self._announced:
                    self._failure = reason
                    self._over.set()
                case FailedToStart(reason):
                    log.error("%s: %s", sender.decode(), reason)
                case EngineVerified(model):
                    self._verified_models.add(model)
                    if self._verified_models == set(self.refused) and not self._front_ends:
                        self._open_front_ends()  # all engines are complete
                case FrontEndReady() if child is not None and self._draining:
                    child.kill()  # it would take requests that nobody drains
                case FrontEndReady() if child is not None:
                    await self._is_ready(child)
                case FrontEndServes() if child is not None:
                    child.serves = True
                    self._announce()
                case WorkerReady(facts) if child is not None:
                    await self._take_worker(child, facts)
                case Beat(step_since) if child is not None:
                    child.heard_at, child.step_since = time.monotonic(), step_since
                case Refused(model, digest, until):
                    self.refused[model].add(digest, until)
                    await self._tell_front_ends()
                case Drained() if child is not None:
                    child.state = "over"

    async def _take_worker(self, child: Child, facts: WorkerFacts) -> None:
        """Let a worker serve unless others of its model run another precision, as `auto` may take
        one if a GPU fails: their captions may differ, and a retried request moves between them.
        At its first start that ends the service, later the worker is started again.
        """
        others = {
            each.facts.identity
            for each in self._workers
            if each.model == child.model and each.state == "ready" and each.facts is not None
        }
        if others <= {facts.identity}:
            child.facts = facts
            await self._is_ready(child)
            return
        reason = (
            f"{child.name} would run {facts.identity} ({facts.runs_on}), and the model's other "
            f"workers {', '.join(others)}: name --provider and --precision"
        )
        if child.epoch > 1:
            log.error(reason)
            child.kill()
        else:
            self._failure = reason
            self._over.set()

    async def _is_ready(self, child: Child) -> None:
        child.state, child.heard_at = "ready", time.monotonic()
        await self._tell_front_ends()
        self._announce()

    def _of(self, name: str) -> Child | None:
        """The child of that name, epoch included; None for messages of an earlier epoch."""
        children = [*self._workers, *self._front_ends]
        return next((child for child in children if child.name == name), None)

    async def _tell_front_ends(self) -> None:
        workers = (*(child.worker_state() for child in self._workers), *self.elsewhere)
        refused = {model: dict(digests.items()) for model, digests in self.refused.items()}
        message = Serving(workers, refused, self._reading)
        self.on_change(message)
        for child in self._front_ends:
            if child.state == "ready":
                await self._send(child, message)

    async def _send(self, child: Child, message: Message) -> None:
        await self._control.send_multipart([child.name.encode(), packed(message)])

    def _announce(self) -> None:
        children = [child.worker_state() for child in self._workers]
        ready = [state for state in (*children, *self.elsewhere) if state.state == "ready"]
        up = all(child.serves for child in self._all_front_ends)
        if self._announced or {state.model for state in ready} != set(self.refused) or not up:
            return
        self._announced = True
        for state in ready:
            if state.facts is not None:
                log.info("model %s, %s", state.model, state.facts.runs_on)
        self.on_ready()

    # --- Shutdown ---------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let front-ends finish their requests, replacing workers meanwhile, then end workers."""
        self._draining = True
        for child in self._front_ends:
            if child.state == "ready":
                await self._send(child, Drain())
            else:
                child.state = "over"
        deadline = time.monotonic() + self._settings.drain_seconds + _STOP_SECONDS
        while any(c.state != "over" for c in self._front_ends) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self._close_ports()  # new clients are refused at once
        for child in self._workers:
            if child.state == "ready":
                await self._send(child, Stop())
            else:
                child.kill()
        self._stopping = True
        while any(c.alive for c in self._workers) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _close_ports(self) -> None:
        if self._ports is not None:
            self._ports.close()

    def _kill_all(self) -> None:
        for child in [*self._workers, *self._front_ends]:
            child.kill()
            if child.process is not None:
                child.process.join(_STOP_SECONDS)


def _pause(child: Child) -> None:
    """Let a process start after a pause that doubles with each failure."""
    pause = _FIRST_PAUSE * 2 ** (child.failures - 1) if child.failures else 0.0
    child.state, child.start_at = "down", time.monotonic() + min(_LONGEST_PAUSE, pause)
