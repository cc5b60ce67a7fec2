"""The engines' side of the front-ends' sockets: takes what they ask for, a task a request."""

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import zmq.asyncio

from server.ipc.messages import (
    TO_WORKER,
    Cancel,
    Generate,
    Hello,
    Message,
    Unserved,
    Why,
    packed,
)
from server.ipc.shared import NoSharedMemory, PixelStore

log = logging.getLogger(__name__)

Owner = bytes  # identity of the front-end that a message came from


@dataclass(slots=True, eq=False)
class RequestTask:
    """A request, whose it is, and the task that answers it."""

    owner: Owner
    message: Generate
    task: asyncio.Task[None] | None = field(default=None)


class Receiver:
    """Serves what front-ends send until it is told to stop. Subclasses say how."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self.stores: dict[Owner, PixelStore] = {}
        self.jobs: dict[int, RequestTask] = {}  # that were begun, by the ids of their requests
        self.over, self._changed = asyncio.Event(), asyncio.Event()

    async def serve(self, job: RequestTask) -> None:
        """Answer a request."""
        raise NotImplementedError

    def came(self, job: RequestTask) -> None:
        """A request was received; subclasses may call `begin` later."""
        self.begin(job)

    def ended(self, number: int) -> None:
        """A request that was begun is over."""

    @property
    def idle(self) -> bool:
        """Whether it may end."""
        return not self.jobs

    async def run(self) -> None:
        """Serve until told to stop, then finish what was begun. Raises what receiving raised."""
        receiving = asyncio.create_task(self._receive())
        over = asyncio.create_task(self.over.wait())
        try:
            await asyncio.wait({receiving, over}, return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
            while not self.idle:
                self._changed.clear()
                await self._changed.wait()
        finally:
            receiving.cancel()
            over.cancel()

    def stop(self) -> None:
        """Finish what was begun."""
        self.over.set()

    def forget(self, owner: Owner) -> None:
        """A front-end has died: nobody waits for what it sent."""
        self.stores.pop(owner, None)
        for job in list(self.jobs.values()):
            if job.owner == owner:
                self.cancel(job.message.request.id)

    def begin(self, job: RequestTask) -> None:
        """Have a request served."""
        number = job.message.request.id
        self.jobs[number] = job
        job.task = asyncio.create_task(self.serve(job))
        job.task.add_done_callback(partial(self._ended, number))

    def cancel(self, number: int) -> None:
        """Nobody waits for a request."""
        if (job := self.jobs.get(number)) is not None and job.task is not None:
            job.task.cancel()
        self._changed.set()

    def pixels(self, job: RequestTask) -> np.ndarray:
        """A request's pixels: a view of what its front-end shares."""
        return self.stores[job.owner][job.message.request.pixels]

    async def send(self, owner: Owner, message: Message) -> None:
        """Tell a front-end."""
        await self._socket.send_multipart([owner, packed(message)])

    async def _receive(self) -> None:
        while True:
            owner, data = await self._socket.recv_multipart()
            match TO_WORKER.decode(data):
                case Hello() as hello:
                    self._open(owner, hello)
                case Generate() as message if owner in self.stores:
                    self.came(RequestTask(owner, message))
                case Generate(request):
                    await self.send(owner, Unserved(request.id, Why.NO_PIXELS))
                case Cancel() as message:
                    self.cancel(message.id)

    def _open(self, owner: Owner, hello: Hello) -> None:
        try:
            self.stores[owner] = PixelStore(Path(hello.store), hello.slots, hello.shape)
        except (OSError, ValueError, NoSharedMemory) as cause:  # such as: it has died
            log.warning("the pixels of %s can't be opened: %s", owner.decode(), cause)

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self.jobs[number]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("request %d was not answered", number, exc_info=error)
        self.ended(number)
        self._changed.set()
