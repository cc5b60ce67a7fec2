"""A front-end's sockets to the engine workers."""

import asyncio
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq
import zmq.asyncio

from server.ipc.dispatcher import BLAMED, Dispatcher
from server.ipc.messages import TO_FRONT_END, Hello, WorkerState, worker_address
from server.ipc.shared import PixelStore

log = logging.getLogger(__name__)


class WorkerLinks:
    """Keeps the dispatcher connected to the workers that serve."""

    def __init__(self, folder: Path, store: PixelStore, identity: str) -> None:
        self._context = zmq.asyncio.Context.instance()
        self._folder, self._identity = folder, identity.encode()
        self.dispatcher = Dispatcher(
            Hello(str(store.path), store.slots, store.shape),
            store.started,
        )
        self._readers: dict[tuple[int, int], asyncio.Task[None]] = {}

    def update(self, workers: Collection[WorkerState]) -> None:
        """Connect to those that serve now, and drop the others."""
        ends = {w.index: w.last_end for w in workers}
        serving = {(w.index, w.epoch): w.runs.identity for w in workers if w.runs is not None}
        for key in self.dispatcher.keys - serving.keys():
            self.dispatcher.lost(key, blamed=ends.get(key[0]) in BLAMED)
            self._readers.pop(key).cancel()
        for key in serving.keys() - self.dispatcher.keys:
            socket = self._context.socket(zmq.DEALER)
            socket.identity = self._identity
            socket.sndhwm = socket.rcvhwm = 0
            socket.connect(worker_address(self._folder, *key))
            self._readers[key] = asyncio.create_task(self._read(key, socket))
            self.dispatcher.connected(key, socket, serving[key])

    async def _read(self, key: tuple[int, int], socket: zmq.asyncio.Socket) -> None:
        while True:
            data = await socket.recv()
            with _logged(key):
                for message in TO_FRONT_END.decode(data):
                    with _logged(key):
                        self.dispatcher.received(key, message)
            await asyncio.sleep(0)  # a step may bring many, with log-probabilities

    async def close(self) -> None:
        """Disconnect from all workers."""
        self.update(())
        await asyncio.sleep(0)


@contextmanager
def _logged(key: tuple[int, int]) -> Iterator[None]:
    """Log an error: a bug with one message must not stop the others."""
    try:
        yield
    except Exception:
        log.exception("a message of worker %d could not be taken", key[0])
