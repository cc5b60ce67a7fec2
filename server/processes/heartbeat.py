"""A worker's connection to the supervisor, on its own thread because a step may take long."""

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from server.ipc.messages import (
    BEAT_SECONDS,
    FROM_SUPERVISOR,
    Beat,
    FrontEndLost,
    Stop,
    WorkerFacts,
    WorkerReady,
    control_address,
    packed,
    process_name,
)

if TYPE_CHECKING:
    from server.processes.worker import Worker


class Heartbeat(threading.Thread):
    """Sends heartbeats to the supervisor, and receives its messages for the worker."""

    def __init__(self, context: zmq.Context, folder: Path, index: int, epoch: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._socket = context.socket(zmq.DEALER)
        self._socket.identity = process_name("worker", index, epoch).encode()
        self._socket.linger = 1000
        self._address = control_address(folder)
        self._ready: tuple[Worker, WorkerFacts, asyncio.AbstractEventLoop] | None = None

    def serving(self, worker: "Worker", facts: WorkerFacts) -> None:
        """Report the worker as ready. Called on its event loop, which gets the messages for it."""
        self._ready = worker, facts, asyncio.get_running_loop()

    def run(self) -> None:
        """Send heartbeats until the process ends."""
        self._socket.connect(self._address)
        told = False
        while True:
            ready = self._ready
            if ready is not None and not told:
                self._socket.send(packed(WorkerReady(ready[1])))
                told = True
            self._socket.send(packed(Beat(ready[0].step_since if ready else None)))
            if self._socket.poll(BEAT_SECONDS * 1000):
                message = FROM_SUPERVISOR.decode(self._socket.recv())
                if ready is None:
                    continue
                worker, _, loop = ready
                match message:
                    case Stop():
                        loop.call_soon_threadsafe(worker.stop)
                    case FrontEndLost(name):
                        loop.call_soon_threadsafe(worker.forget, name.encode())
