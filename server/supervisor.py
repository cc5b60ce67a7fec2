"""The supervisor: starts the processes, watches them, replaces them, and ends them in order.

A process is replaced when it ended, when it has not been heard of for some seconds (hung), or when
an engine worker is in one step for too long (stuck). One that had served is replaced at once, one
that fails as it starts after a pause that doubles.
"""

import asyncio
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import tornado.netutil
import zmq
import zmq.asyncio

from runtime.errors import VignetteError
from server import frontend, metrics
from server.settings import Settings
from server.wire import Message, control_address, new_run_folder, packed, unpacked

log = logging.getLogger(__name__)

_SILENCE_SECONDS = 3.0  # without a beat: it is stopped, or starved
_WATCH_SECONDS = 0.1
_FROZEN_SECONDS = 1.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_STOP_SECONDS = 5.0
_CONTEXT = multiprocessing.get_context("spawn")


class CannotListen(VignetteError):
    """The port can't be opened."""


class CannotStart(VignetteError):
    """No process could be started; the message is its own."""


@dataclass(slots=True)
class Child:
    """A process and its lives. `epoch` counts them; times are `time.monotonic()`."""

    kind: str
    index: int
    target: Callable[..., Any]
    environment: dict[str, str] = field(default_factory=dict)
    epoch: int = 0
    process: BaseProcess | None = None
    state: str = "starting"  # starting, ready, down, over
    heard_at: float = 0.0
    step_since: float | None = None
    start_at: float = 0.0
    failures: int = 0
    facts: Message = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its identity in this life."""
        return f"{self.kind}-{self.index}-{self.epoch}"

    def public(self) -> Message:
        """What front-ends and /health/ready are told."""
        known = {k: v for k, v in self.facts.items() if k != "op"}
        return {
            "index": self.index,
            "epoch": self.epoch,
            "state": "recovering" if self.state == "down" or self._again else self.state,
            "pid": self.process.pid if self.process else None,
            "restarts": self.epoch - 1,
            **{k: v for k, v in known.items() if k != "pid"},
        }

    @property
    def _again(self) -> bool:
        return self.state == "starting" and self.epoch > 1


class Supervisor:
    """One run of the service."""

    def __init__(self, settings: Settings, worker_main: Callable[..., Any], devices: list[str]):
        """devices: CUDA_VISIBLE_DEVICES of each worker; an empty string changes nothing."""
        self._settings, self._draining, self._over = settings, False, asyncio.Event()
        self._failure: str | None = None
        self._announced = False
        self._workers = [
            Child("worker", index, worker_main, _gpu(d)) for index, d in enumerate(devices)
        ]
        self._front_ends: list[Child] = []
        self._folder = new_run_folder()
        counts = self._folder / "metrics"
        counts.mkdir()
        os.environ[metrics.FOLDER] = str(counts)
        self._control = zmq.asyncio.Context.instance().socket(zmq.ROUTER)

    async def run(self) -> None:
        """Serve until told to stop. Raises CannotListen or CannotStart."""
        with self._ports() as (port, ops_port):
            self._control.bind(control_address(self._folder))
            stop = _stop_event()
            for child in self._workers:
                self._start(child)
            hearing = asyncio.create_task(self._hear(port, ops_port))
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
                self._kill_all()
                self._control.close(linger=0)
                shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _ports(self) -> Iterator[tuple[int, int | None]]:
        """Hold the ports, so that nobody takes them while front-ends come and go."""
        held = [_reserve(self._settings.host, self._settings.port)]
        if self._settings.ops_port is not None:
            held.append(_reserve(self._settings.host, self._settings.ops_port))
        try:
            ports = [sock.getsockname()[1] for sock in held]
            yield ports[0], ports[1] if len(ports) > 1 else None
        finally:
            for sock in held:
                sock.close()

    # --- Lives ------------------------------------------------------------------------------------

    def _start(self, child: Child) -> None:
        child.epoch += 1
        child.state, child.step_since = "starting", None
        child.heard_at = time.monotonic()
        arguments = (self._settings, self._folder, child.index, child.epoch)
        if child.kind == "front":
            arguments = (self._settings, self._folder, child.name, *child.facts["ports"])
        child.process = _CONTEXT.Process(target=child.target, args=arguments, name=child.name)
        with _environment(child.environment):
            child.process.start()

    def _open_front_ends(self, port: int, ops_port: int | None) -> None:
        for index in range(self._settings.front_ends):
            child = Child("front", index, frontend.main, facts={"ports": (port, ops_port)})
            self._front_ends.append(child)
            self._start(child)

    async def _watch(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if now - last > _FROZEN_SECONDS:  # all of us were stopped: nobody could beat
                for child in [*self._workers, *self._front_ends]:
                    child.heard_at = now
                    child.step_since = None
            last = now
            for child in [*self._workers, *self._front_ends]:
                if child.state == "down":
                    if now >= child.start_at:
                        self._start(child)
                elif child.state != "over" and (reason := self._ailing(child, now)):
                    await self._replace(child, reason)

    def _ailing(self, child: Child, now: float) -> str | None:
        assert child.process is not None
        if not child.process.is_alive():
            return "ended"
        # A start is not watched: loading a graph may hold the interpreter's lock for long.
        if child.state == "ready" and now - child.heard_at > _SILENCE_SECONDS:
            return "hung"
        since = now if child.step_since is None else child.step_since
        return "stuck" if now - since > self._settings.step_seconds else None

    async def _replace(self, child: Child, reason: str) -> None:
        assert child.process is not None
        served = child.state == "ready"
        pid, code = child.process.pid, child.process.exitcode
        child.process.kill()
        metrics_of_dead(pid)
        if child.kind == "front":
            (self._folder / f"{child.name}.pixels").unlink(missing_ok=True)
            for worker in self._workers:
                if worker.state == "ready":
                    await self._send(worker, {"op": "gone", "name": child.name})
        if self._draining and child.kind == "front":
            child.state = "over"
            return
        log.error("%s (pid %s, exit code %s) %s: it is replaced", child.name, pid, code, reason)
        child.failures = 0 if served else child.failures + 1
        pause = _FIRST_PAUSE * 2 ** (child.failures - 1) if child.failures else 0.0
        child.state, child.start_at = "down", time.monotonic() + min(_LONGEST_PAUSE, pause)
        if child.kind == "worker":
            await self._tell_front_ends()
        if not self._announced and child.failures > 1:
            self._failure = self._failure or f"no {child.kind} process stays up: see the log"
            self._over.set()

    # --- Messages ---------------------------------------------------------------------------------

    async def _hear(self, port: int, ops_port: int | None) -> None:
        while True:
            sender, data = await self._control.recv_multipart()
            message = unpacked(data)
            child = self._of(sender.decode())
            match message["op"]:
                case "failed" if not self._announced:
                    self._failure = message["message"]
                    self._over.set()
                case "failed":
                    log.error("%s: %s", sender.decode(), message["message"])
                case "found" if not self._front_ends:  # the engine is whole: the port may open
                    self._open_front_ends(port, ops_port)
                case "ready" if child in self._front_ends and self._draining:
                    assert child is not None and child.process is not None
                    child.process.kill()  # it would take requests that nobody drains
                case "ready" if child is not None:
                    child.state, child.heard_at = "ready", time.monotonic()
                    child.facts |= message
                    await self._tell_front_ends()
                    self._announce(port)
                case "beat" if child is not None:
                    child.heard_at, child.step_since = time.monotonic(), message["step_since"]
                case "drained" if child is not None:
                    child.state = "over"

    def _of(self, name: str) -> Child | None:
        """The child of that name, in this life; a dead one's last words are nobody's."""
        children = [*self._workers, *self._front_ends]
        return next((child for child in children if child.name == name), None)

    async def _tell_front_ends(self) -> None:
        workers = [child.public() for child in self._workers]
        for child in self._front_ends:
            if child.state == "ready":
                await self._send(child, {"op": "workers", "workers": workers})

    async def _send(self, child: Child, message: Message) -> None:
        await self._control.send_multipart([child.name.encode(), packed(message)])

    def _announce(self, port: int) -> None:
        ready = [w for w in self._workers if w.state == "ready"]
        up = self._front_ends and all(f.state == "ready" for f in self._front_ends)
        if self._announced or not ready or not up:
            return
        self._announced = True
        for worker in ready:
            log.info("model %s, %s", worker.facts["model"], worker.facts["runs_on"])
        host = self._settings.host
        shown = "localhost" if host in ("0.0.0.0", "127.0.0.1", "::", "::1") else host
        shown = f"[{shown}]" if ":" in shown else shown
        print(
            f"\nVignette is ready on http://{shown}:{port} - try:\n\n"
            f"  curl --data-binary @demo/samples/owl.png http://{shown}:{port}/caption\n",
            flush=True,
        )

    # --- The end ----------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Front-ends finish what they accepted, with workers replaced meanwhile; then all end."""
        self._draining = True
        for child in self._front_ends:
            if child.state == "ready":
                await self._send(child, {"op": "drain"})
            else:
                child.state = "over"
        deadline = time.monotonic() + self._settings.drain_seconds + _STOP_SECONDS
        while any(c.state != "over" for c in self._front_ends) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        for child in self._workers:
            if child.state == "ready":
                await self._send(child, {"op": "stop"})
            elif child.process is not None:
                child.process.kill()
            child.state = "over"
        while any(_lives(c) for c in self._workers) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def _kill_all(self) -> None:
        for child in [*self._workers, *self._front_ends]:
            if child.process is not None:
                child.process.kill()
                child.process.join(_STOP_SECONDS)


def _lives(child: Child) -> bool:
    return child.process is not None and child.process.is_alive()


def metrics_of_dead(pid: int | None) -> None:
    """Take a process's gauges out of the sums; what it counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    if pid is not None:
        mark_process_dead(pid)


def _gpu(device: str) -> dict[str, str]:
    """Variables of a worker with a GPU of its own, counted as the driver's library counts."""
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return order | {"CUDA_VISIBLE_DEVICES": device} if device else order


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Let a child that is started meanwhile see other variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds a port without listening; CannotListen if somebody else has it."""
    try:
        # Without SO_REUSEPORT first: with it, another server's port could be shared unseen.
        free = tornado.netutil.bind_sockets(port, host, backlog=1)
        port = free[0].getsockname()[1]
        for sock in free:
            sock.close()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError as cause:
        raise CannotListen(
            f"can't listen on {host}:{port} ({cause.strerror}): choose another with --port, or "
            "stop what uses it"
        ) from cause
    return held


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second takes its default course, at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop
