"""A worker's connection to the supervisor, on its own thread because a step may take long."""

import asyncio
import threading
from pathlib import Path

import zmq

from runtime.stepper import Stepper
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
from server.ipc.receiver import Receiver


class Heartbeat(threading.Thread):
    """Sends heartbeats to the supervisor, and receives its messages for the worker."""

    def __init__(self, context: zmq.Context, folder: Path, index: int, epoch: int) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._socket = context.socket(zmq.DEALER)
        self._socket.identity = process_name("worker", index, epoch).encode()
        self._socket.linger = 1000
        self._address = control_address(folder)
        self._ready: tuple[WorkerReady, Receiver, Stepper, asyncio.AbstractEventLoop] | None = None

    def serving(self, worker: Receiver, stepper: Stepper, facts: WorkerFacts) -> None:
        """Report the worker as ready. Called on its event loop, which gets the messages for it."""
        self._ready = WorkerReady(facts), worker, stepper, asyncio.get_running_loop()

    def run(self) -> None:
        """Send heartbeats until the process ends."""
        self._socket.connect(self._address)
        told = False
        while True:
            ready = self._ready
            if ready is not None and not told:
                self._socket.send(packed(ready[0]))
                told = True
            self._socket.send(packed(Beat(ready[2].step_since if ready else None)))
            if self._socket.poll(BEAT_SECONDS * 1000):
                message = FROM_SUPERVISOR.decode(self._socket.recv())
                if ready is None:
                    continue
                _, worker, _, loop = ready
                match message:
                    case Stop():
                        loop.call_soon_threadsafe(worker.stop)
                    case FrontEndLost(name):
                        loop.call_soon_threadsafe(worker.forget, name.encode())
