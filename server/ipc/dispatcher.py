"""The front-end's side of the engine workers: who gets which request, and what if they die.

* A request goes to the worker with the fewest in flight. If no worker serves, it waits.
* A worker that dies was killed by one of the requests that it had started, or by none. Those that
  it had not started are sent to another as if nothing had happened.
* Those that it had started are suspects: each is sent again, alone, so that no other is harmed.
  (The worker sees to that too, because other front-ends send to it as well.) A suspect in whose
  step a worker crashes again is answered with an error, and its image is refused for some minutes,
  by all front-ends; when it is sent after that it is a suspect from the start.
* A worker that somebody killed or stopped proves nothing: its suspects get more tries, and what is
  given up in the end is not refused the next time.
* A step that raises is treated as a crash: its requests are tried again one by one.
"""

import asyncio
import bisect
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from runtime.errors import InvalidRequest, VignetteError
from runtime.request import Caption, FinishReason
from server.ipc.messages import Message, packed
from server.ipc.remembered import Remembered

log = logging.getLogger(__name__)

QUARANTINE_SECONDS = 600.0
BLAMED = ("crashed", "stuck")  # ends of a worker that are its own doing, or its request's
_CRASHES, _LOSSES = 2, 4  # of a worker with a request in it, until that is given up
_DEADLY = "the engine failed on this image twice: it is not tried again for ten minutes"
_UNLUCKY = "the engine was killed several times with this request: try again later"


class EngineFailed(VignetteError):
    """The engine broke twice on this request; it goes on with the others."""


class Expired(VignetteError):
    """The request's deadline passed."""


@dataclass(slots=True, eq=False)
class Work:
    """A request on its way through a worker. Its pixels are in `slot` of the front-end's store.

    digest: of its images, by which a killer is known again. deadline and queued_at:
    `time.perf_counter()`, which all processes of a machine share.
    """

    slot: int
    prompt: str | None
    max_new_tokens: int | None
    digest: str
    deadline: float
    urgent: bool = True
    queued_at: float = field(default_factory=time.perf_counter)
    number: int = 0
    suspect: bool = False
    crashes: int = 0  # of workers that had started it
    losses: int = 0  # the same, and those that somebody killed
    link: "Link | None" = None
    done: "asyncio.Future[Caption]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Pipe(Protocol):
    """A socket to one worker; tests put a list in its place."""

    def send(self, data: bytes) -> Any:
        """Queue a message."""

    def close(self, linger: int = 0) -> Any:
        """Drop what was not sent."""


class Started(Protocol):
    """For each slot the number of the request that a worker began with there, or 0."""

    def __getitem__(self, slot: int, /) -> Any: ...

    def __setitem__(self, slot: int, number: int, /) -> None: ...


@dataclass(slots=True, eq=False)
class Link:
    """A worker in one of its lives, and what it has of ours."""

    key: tuple[int, int]  # index, epoch
    pipe: Pipe
    inside: dict[int, Work] = field(default_factory=dict)

    @property
    def holds_a_suspect(self) -> bool:
        """Whether it must be left alone with what it has."""
        return any(work.suspect for work in self.inside.values())


class Dispatcher:
    """Sends work to workers and settles its future, whatever happens to them.

    Used on the event loop's thread only.
    """

    def __init__(self, hello: Message, started: Started) -> None:
        """hello: what every worker is told first. started: the store's, which workers write."""
        # Told a digest and until when it is refused, to pass it on.
        self.on_refused: Callable[[str, float], object] = lambda digest, until: None
        self._hello, self._started = hello, started
        self._links: dict[tuple[int, int], Link] = {}
        self._pending: deque[Work] = deque()
        self._suspects: deque[Work] = deque()
        self._numbers = itertools.count(1)
        self._quarantine = Remembered(QUARANTINE_SECONDS)

    @property
    def serving(self) -> bool:
        """Whether any worker can take work now."""
        return bool(self._links)

    @property
    def inside(self) -> int:
        """Requests that were not answered yet."""
        held = sum(len(link.inside) for link in self._links.values())
        return held + len(self._pending) + len(self._suspects)

    def check(self, digest: str) -> None:
        """Raise EngineFailed for an image that killed a worker twice."""
        if digest in self._quarantine:
            raise EngineFailed(_DEADLY)

    def refuse(self, digest: str, until: float | None = None) -> float:
        """Take no image with this digest until then: it killed workers, here or for another."""
        return self._quarantine.add(digest, until)

    async def caption(self, work: Work) -> Caption:
        """Wait for a request's caption; cancelling the awaiting task takes it back.

        Raises InvalidRequest, EngineFailed, or Expired when its deadline passes first.
        """
        work.number = next(self._numbers)
        if self._quarantine.expired(work.digest):
            work.suspect, work.crashes = True, _CRASHES - 1
        (self._suspects if work.suspect else self._pending).append(work)
        self._pump()
        try:
            async with asyncio.timeout(max(0.0, work.deadline - time.perf_counter())):
                return await work.done
        except TimeoutError:
            raise Expired("the deadline passed before the caption was there") from None
        finally:
            self._forget(work)
            self._pump()

    def connected(self, key: tuple[int, int], pipe: Pipe) -> None:
        """A worker serves from now on."""
        pipe.send(packed(self._hello))
        self._links[key] = Link(key, pipe)
        self._pump()

    def lost(self, key: tuple[int, int], blamed: bool) -> None:
        """A worker is gone; what it had is sent again. blamed: it crashed by itself."""
        link = self._links.pop(key, None)
        if link is None:
            return
        link.pipe.close(linger=0)
        for work in list(link.inside.values()):
            self._again(work, blamed)
        self._pump()

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Of the workers that serve."""
        return set(self._links)

    def received(self, key: tuple[int, int], message: Message) -> None:
        """What a worker says of a request."""
        link = self._links.get(key)
        work = link.inside.get(message["id"]) if link else None
        if work is None or work.done.done():
            return  # it was taken back meanwhile
        match message["op"]:
            case "answer":
                work.done.set_result(_caption(message["caption"]))
            case "expired":
                work.done.set_exception(Expired("the deadline passed while it was queued"))
            case "failed":
                self._again(work, blamed=True)
                self._pump()
            case "error":
                known = message["kind"] == "invalid_request"
                kind = InvalidRequest if known else EngineFailed
                work.done.set_exception(kind(message["message"]))

    def _again(self, work: Work, blamed: bool) -> None:
        """A worker failed on it, or with it inside. blamed: by itself."""
        if work.link is not None:
            work.link.inside.pop(work.number, None)
        work.link = None
        if work.done.done():
            return  # it was answered just before
        if self._started[work.slot] != work.number:
            bisect.insort(self._pending, work, key=lambda each: each.number)  # where it was
            return
        work.suspect = True
        work.losses += 1
        work.crashes += blamed
        if work.crashes >= _CRASHES:
            self.on_refused(work.digest, self.refuse(work.digest))
            log.error(
                "the engine failed twice on an image, which is refused for %.0f minutes: sha256 %s",
                QUARANTINE_SECONDS / 60, work.digest,
            )  # fmt: skip
            work.done.set_exception(EngineFailed(_DEADLY))
        elif work.losses >= _LOSSES:
            work.done.set_exception(EngineFailed(_UNLUCKY))
        else:
            self._suspects.append(work)

    def _pump(self) -> None:
        """Send what can be sent; what turned out to be deadly meanwhile is refused."""
        for queue in (self._pending, self._suspects) if self._quarantine else ():
            for work in [w for w in queue if w.digest in self._quarantine]:
                queue.remove(work)
                if not work.done.done():
                    work.done.set_exception(EngineFailed(_DEADLY))
        while (self._suspects or self._pending) and self._links:
            link = min(self._links.values(), key=lambda link: len(link.inside))
            if self._suspects and not link.inside:
                self._send(self._suspects.popleft(), link)
            elif self._pending:
                free = [link for link in self._links.values() if not link.holds_a_suspect]
                if not free or (self._suspects and len(free) == 1):
                    return  # the suspects come first: this worker empties for them
                self._send(self._pending.popleft(), min(free, key=lambda link: len(link.inside)))
            else:
                return

    def _send(self, work: Work, link: Link) -> None:
        work.link = link
        link.inside[work.number] = work
        self._started[work.slot] = 0
        link.pipe.send(
            packed(
                {
                    "op": "caption",
                    "id": work.number,
                    "slot": work.slot,
                    "prompt": work.prompt,
                    "max_new_tokens": work.max_new_tokens,
                    "queued_at": work.queued_at,
                    "deadline": work.deadline,
                    "urgent": work.urgent,
                    "alone": work.suspect,
                }
            )
        )

    def _forget(self, work: Work) -> None:
        """It was answered, or its caller gave up."""
        if work.link is not None:
            if work.link.inside.pop(work.number, None) and not _answered(work):
                work.link.pipe.send(packed({"op": "cancel", "id": work.number}))
            work.link = None
        for queue in (self._pending, self._suspects):
            if work in queue:
                queue.remove(work)


def _answered(work: Work) -> bool:
    """Whether the worker is done with it; if not, it has to be told that nobody waits."""
    return work.done.done() and not work.done.cancelled()


def _caption(fields: dict[str, Any]) -> Caption:
    return Caption(
        **{
            **fields,
            "token_ids": tuple(fields["token_ids"]),
            "finish_reason": FinishReason(fields["finish_reason"]),
        }
    )
