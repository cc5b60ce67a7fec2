"""The worker's side of the front-ends' sockets: serves each request in a task."""

import asyncio
import logging
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import zmq
import zmq.asyncio
from msgspec import Raw

from server.ipc.messages import (
    TO_WORKER,
    Cancel,
    FailureReason,
    Generate,
    Hello,
    Message,
    Unserved,
    packed,
)
from server.ipc.shared import NoSharedMemory, PixelStore

log = logging.getLogger(__name__)

_AT_ONCE = 32  # messages taken in one turn of the event loop, here and by front-ends
Owner = bytes  # identity of the front-end that a message came from


@dataclass(slots=True, eq=False)
class RequestTask:
    """A request, the front-end that sent it, and the task that serves it."""

    owner: Owner
    message: Generate
    task: asyncio.Task[None] | None = field(default=None)


class Receiver:
    """Serves front-ends' requests until told to stop. Subclasses implement `serve`."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self.stores: dict[Owner, PixelStore] = {}
        self.jobs: dict[int, RequestTask] = {}  # started, by request id
        self._over, self._changed = False, asyncio.Event()
        self._unsent: defaultdict[Owner, list[Raw]] = defaultdict(list)
        self._news = asyncio.Event()

    async def serve(self, job: RequestTask) -> None:
        """Answer a request."""
        raise NotImplementedError

    def received(self, job: RequestTask) -> None:
        """Start a request that was received; subclasses may call `begin` later."""
        self.begin(job)

    def ended(self, number: int) -> None:
        """Note that a started request has ended."""

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return not self.jobs

    async def run(self) -> None:
        """Serve until told to stop, then until idle. Raises errors of receiving and sending."""
        tasks = [asyncio.create_task(each) for each in (self._receive(), self._send())]
        for task in tasks:
            task.add_done_callback(lambda _: self._changed.set())
        try:
            while not (self._over and self.idle):
                for task in tasks:
                    if task.done():  # with an error
                        task.result()
                self._changed.clear()
                await self._changed.wait()
            await self._flush()
        finally:
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """End `run` once no request is left."""
        self._over = True
        self._changed.set()

    def forget(self, owner: Owner) -> None:
        """Cancel the requests of a front-end that has died, and drop its store."""
        self.stores.pop(owner, None)
        for job in list(self.jobs.values()):
            if job.owner == owner:
                self.cancel(job.message.request.id)

    def begin(self, job: RequestTask) -> None:
        """Start the task that serves a request."""
        number = job.message.request.id
        self.jobs[number] = job
        job.task = asyncio.create_task(self.serve(job))
        job.task.add_done_callback(partial(self._ended, number))

    def cancel(self, number: int) -> None:
        """Cancel a request that nobody waits for."""
        if (job := self.jobs.get(number)) is not None and job.task is not None:
            job.task.cancel()
        self._changed.set()

    def pixels(self, job: RequestTask) -> np.ndarray:
        """A request's pixels: a view of its front-end's shared memory."""
        return self.stores[job.owner][job.message.slot]

    def send(self, owner: Owner, message: Message) -> None:
        """Send a message to a front-end, together with others of the same moment."""
        self._unsent[owner].append(Raw(packed(message)))
        self._news.set()

    async def _send(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await self._flush()

    async def _flush(self) -> None:
        while self._unsent:
            owner, messages = self._unsent.popitem()
            for first in range(0, len(messages), _AT_ONCE):
                together = messages[first : first + _AT_ONCE]
                await self._socket.send_multipart([owner, packed(together)])

    async def _receive(self) -> None:
        while True:
            self._take(*await self._socket.recv_multipart())
            # Those that are there already, without a round of the event loop for each.
            with suppress(zmq.Again):
                for _ in range(_AT_ONCE):
                    self._take(*await self._socket.recv_multipart(zmq.DONTWAIT))
            await asyncio.sleep(0)

    def _take(self, owner: Owner, data: bytes) -> None:
        match TO_WORKER.decode(data):
            case Hello() as hello:
                self._open(owner, hello)
            case Generate() as message if owner in self.stores:
                self.received(RequestTask(owner, message))
            case Generate(request):
                self.send(owner, Unserved(request.id, FailureReason.NO_PIXELS))
            case Cancel() as message:
                self.cancel(message.id)

    def _open(self, owner: Owner, hello: Hello) -> None:
        stable = owner.rpartition(b"-")[0]
        for other in list(self.stores):
            if stable and other.startswith(stable + b"-") and other != owner:
                self.forget(other)  # it was replaced by this one
        try:
            self.stores[owner] = PixelStore(Path(hello.store), hello.slots, hello.shape)
        except (OSError, ValueError, NoSharedMemory) as cause:  # e.g. the front-end died
            log.warning("the pixels of %s can't be opened: %s", owner.decode(), cause)

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self.jobs[number]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("request %d was not answered", number, exc_info=error)
        self.ended(number)
        self._changed.set()
