"""The front-end's side of the engine workers: routes requests, and retries those of dead workers.

* A request goes to the worker with the fewest in flight. If no worker serves, it waits.
* If a worker dies, only requests that it had started can be the cause. The others are sent to
  another worker as if nothing had happened.
* Started requests are suspects: each is sent again, alone, so that no other is harmed. (The worker
  enforces that too, because other front-ends send to it as well.) A suspect in whose step a worker
  crashes again is answered with an error, and all front-ends refuse its image for some minutes;
  when the image is sent after that, it is a suspect from the start.
* A worker that was killed or stopped from outside proves nothing: its suspects get more tries, and
  the image of a request that is given up in the end is not refused.
* A step that raises is treated as a crash: its requests are tried again one by one.
* A request that is tried again is generated from its beginning; tokens already handed on are left
  out (`server/ipc/replay_filter.py`).
* A worker may stand for engines elsewhere, and report why a request failed there.
"""

import asyncio
import bisect
import itertools
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from runtime.errors import VignetteError
from runtime.request import FinishReason, GenerationRequest, RequestOutput
from server.ipc.deadline import until
from server.ipc.failures import PoisonedImage, error_for
from server.ipc.messages import (
    Cancel,
    FailureReason,
    Generate,
    Hello,
    Output,
    StepFailed,
    Unserved,
    packed,
)
from server.ipc.remembered import Remembered
from server.ipc.replay_filter import ReplayFilter

log = logging.getLogger(__name__)

QUARANTINE_SECONDS = 600.0
BLAMED = ("crashed", "stuck")  # ends of a worker caused by itself or by a request
_CRASHES, _LOSSES = 2, 4  # of workers with a request inside, before the request is given up


@dataclass(slots=True, eq=False)
class RequestInFlight:
    """A request on its way through a worker.

    slot: of the front-end's store, with its pixels. digest: of its images; identifies those that
    crash workers. turn: order of arrival. runs: what its last worker runs.
    """

    request: GenerationRequest
    slot: int
    digest: str
    turn: int
    suspect: bool = False
    crashes: int = 0  # of workers that had started it
    losses: int = 0  # crashes, and workers killed from outside
    replayed: ReplayFilter = field(default_factory=ReplayFilter)
    link: "Link | None" = None
    runs: str = ""
    news: "asyncio.Queue[RequestOutput | VignetteError]" = field(default_factory=asyncio.Queue)
    ended: bool = False

    def end(self, news: RequestOutput | VignetteError) -> None:
        """Deliver the last output or the error, unless the request has ended."""
        if not self.ended:
            self.ended = True
            self.news.put_nowait(news)

    def take(self, output: RequestOutput) -> None:
        """Deliver the new tokens of a worker's output."""
        output = self.replayed.fresh(output)
        if output.finish_reason is FinishReason.EXPIRED:
            self.end(error_for(FailureReason.EXPIRED))
        elif output.finish_reason is not None:
            self.end(output)
        elif output.token_ids:
            self.news.put_nowait(output)


class Pipe(Protocol):
    """A socket to one worker; tests put a list in its place."""

    def send(self, data: bytes) -> Any:
        """Queue a message."""

    def close(self, linger: int = 0) -> Any:
        """Close the socket, and drop unsent messages."""


@dataclass(slots=True, eq=False)
class Link:
    """A worker in one epoch, and this front-end's requests in it.

    runs: its engine and precision. Workers that run the same give the same tokens.
    """

    key: tuple[int, int]  # index, epoch
    pipe: Pipe
    runs: str
    inside: dict[int, RequestInFlight] = field(default_factory=dict)

    @property
    def holds_a_suspect(self) -> bool:
        """Whether a suspect is inside, beside which no request may be sent."""
        return any(entry.suspect for entry in self.inside.values())


class Dispatcher:
    """Sends requests to workers and yields their outputs, whatever happens to the workers.

    Used on the event loop's thread only.
    """

    def __init__(self, hello: Hello, started: np.ndarray) -> None:
        """hello: first message to every worker. started: the store's; for each slot, the id of the
        request that a worker has started there, or 0.
        """
        # Called with a digest and the end of its refusal, to tell other front-ends.
        self.on_refused: Callable[[str, float], object] = lambda digest, until: None
        self._hello, self._started = hello, started
        self._links: dict[tuple[int, int], Link] = {}
        self._pending: deque[RequestInFlight] = deque()
        self._suspects: deque[RequestInFlight] = deque()
        self._quarantine = Remembered(QUARANTINE_SECONDS)
        self._turns = itertools.count()

    @property
    def serving(self) -> bool:
        """Whether any worker can take requests now."""
        return bool(self._links)

    def check(self, digest: str) -> None:
        """Raise PoisonedImage for an image that crashed workers twice."""
        if digest in self._quarantine:
            raise PoisonedImage()

    def refuse(self, digest: str, until: float | None = None) -> float:
        """Refuse images with this digest until then (default: ten minutes); return that time."""
        return self._quarantine.add(digest, until)

    async def generate(
        self, request: GenerationRequest, slot: int, digest: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs, the last with a finish reason; closing cancels the request.

        slot: of the store, with the pixels. digest: of the images.
        Raises EngineFailed, QueueFull, or Expired when its deadline passes first.
        """
        entry = RequestInFlight(request, slot, digest, next(self._turns))
        if self._quarantine.expired(digest):
            entry.suspect, entry.crashes = True, _CRASHES - 1
        (self._suspects if entry.suspect else self._pending).append(entry)
        self._pump()
        try:
            finished = False
            while not finished:
                news = await self._news(entry)
                if isinstance(news, VignetteError):
                    raise news
                finished = news.finish_reason is not None
                yield news
        finally:
            self._forget(entry)
            self._pump()

    async def _news(self, entry: RequestInFlight) -> RequestOutput | VignetteError:
        async with until(entry.request.scheduling.deadline):
            return await entry.news.get()

    def connected(self, key: tuple[int, int], pipe: Pipe, runs: str = "") -> None:
        """Add a worker that serves from now on. runs: see `Link`."""
        pipe.send(packed(self._hello))
        self._links[key] = Link(key, pipe, runs)
        self._pump()

    def lost(self, key: tuple[int, int], blamed: bool) -> None:
        """Remove a worker and send its requests again. blamed: its end is one of `BLAMED`."""
        link = self._links.pop(key, None)
        if link is None:
            return
        link.pipe.close(linger=0)
        for entry in list(link.inside.values()):
            self._again(entry, blamed)
        self._pump()

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Index and epoch of each worker that serves."""
        return set(self._links)

    def received(self, key: tuple[int, int], message: Output | StepFailed | Unserved) -> None:
        """Handle a worker's message about a request."""
        link = self._links.get(key)
        number = message.output.id if isinstance(message, Output) else message.id
        entry = link.inside.get(number) if link else None
        if link is None or entry is None or entry.ended:
            return  # the request was cancelled meanwhile
        match message:
            case Output(output):
                entry.take(output)
            case StepFailed():
                self._again(entry, blamed=True)
            case Unserved(_, reason):
                self._unserved(entry, reason)
        if entry.ended:  # even if its last output was not read yet
            link.inside.pop(number, None)
        if entry.ended or isinstance(message, StepFailed):
            self._pump()

    def _again(self, entry: RequestInFlight, blamed: bool) -> None:
        """Retry a request whose step or worker failed. blamed: the request may be the cause."""
        number = entry.request.id
        if entry.link is not None:
            entry.link.inside.pop(number, None)
        entry.link = None
        if entry.ended:
            return  # the request was answered just before
        if self._started[entry.slot] != number:
            bisect.insort(self._pending, entry, key=lambda each: each.turn)  # at its old place
            return
        entry.suspect = True
        entry.losses += 1
        entry.crashes += blamed
        if entry.crashes >= _CRASHES:
            self._unserved(entry, FailureReason.POISONED)
        elif entry.losses >= _LOSSES:
            self._unserved(entry, FailureReason.LOST)
        else:
            self._suspects.append(entry)

    def _unserved(self, entry: RequestInFlight, reason: FailureReason) -> None:
        """End a request with the error for `reason`; refuse a poisoned image from now on."""
        if reason is FailureReason.POISONED:
            self.on_refused(entry.digest, self.refuse(entry.digest))
            log.error(
                "the engine failed twice on an image, which is refused for %.0f minutes: sha256 %s",
                QUARANTINE_SECONDS / 60, entry.digest,
            )  # fmt: skip
        entry.end(error_for(reason))

    def _pump(self) -> None:
        """Send waiting requests to free workers; refuse those whose image is poisoned."""
        for queue in (self._pending, self._suspects) if self._quarantine else ():
            for entry in [w for w in queue if w.digest in self._quarantine]:
                queue.remove(entry)
                entry.end(PoisonedImage())
        while (self._suspects or self._pending) and self._links:
            link = min(self._links.values(), key=lambda link: len(link.inside))
            if self._suspects and not link.inside:
                self._send(self._suspects.popleft(), link)
            elif self._pending:
                free = [link for link in self._links.values() if not link.holds_a_suspect]
                if self._suspects and free:  # they come first: one worker drains for them
                    free.remove(min(free, key=lambda link: len(link.inside)))
                if not free:
                    return
                self._send(self._pending.popleft(), min(free, key=lambda link: len(link.inside)))
            else:
                return

    def _send(self, entry: RequestInFlight, link: Link) -> None:
        if entry.replayed.tokens and entry.runs != link.runs:  # it would go on with other tokens
            self._unserved(entry, FailureReason.REPLACED)
            return
        entry.link, entry.runs = link, link.runs
        entry.replayed.again()
        link.inside[entry.request.id] = entry
        self._started[entry.slot] = 0
        link.pipe.send(packed(Generate(entry.request, entry.slot, entry.suspect, entry.digest)))

    def _forget(self, entry: RequestInFlight) -> None:
        """Drop a request that was answered, or whose caller gave up."""
        if entry.link is not None:
            if entry.link.inside.pop(entry.request.id, None) and not entry.ended:
                entry.link.pipe.send(packed(Cancel(entry.request.id)))
            entry.link = None
        entry.ended = True
        for queue in (self._pending, self._suspects):
            if entry in queue:
                queue.remove(entry)
