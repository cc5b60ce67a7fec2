"""What the processes say to each other: typed messages in MessagePack over ZeroMQ.

In the folder of a run every worker binds `worker-<index>-<epoch>`, to which each
front-end connects, and the supervisor binds `control`. A worker that is started again takes the
next epoch, so that nothing that was queued for the dead one reaches it by itself.

| from | to | messages |
| --- | --- | --- |
| front-end | worker | Hello, Generate, Cancel |
| worker | front-end | Output, StepFailed, Unserved |
| worker, front-end | supervisor | Beat, FailedToStart |
| worker | supervisor | Found, WorkerReady |
| front-end | supervisor | FrontEndReady, Refused, Drained |
| supervisor | front-end | Serving, Drain |
| supervisor | worker | Gone, Stop |
"""

from enum import StrEnum
from pathlib import Path

import zmq
from msgspec import Struct, msgpack

from runtime.request import GenerationRequest, RequestOutput

BEAT_SECONDS = 0.5


class Message(Struct, frozen=True, tag=True):
    """One of those below."""


class Hello(Message, frozen=True):
    """A front-end's pixels: file, slots and shape of its PixelStore."""

    store: str
    slots: int
    shape: tuple[int, ...]


class Generate(Message, frozen=True):
    """A request whose pixels are in a slot of the sender's store.

    alone: with nothing beside it. digest: of its images.
    """

    request: GenerationRequest
    alone: bool
    digest: str = ""


class Cancel(Message, frozen=True):
    """Nobody waits for this request any more."""

    id: int


class Output(Message, frozen=True):
    """News of a request."""

    output: RequestOutput


class StepFailed(Message, frozen=True):
    """A step that this request was in raised."""

    id: int


class Why(StrEnum):
    """A request was not served."""

    DEADLY = "deadly"  # its image broke an engine twice, and is refused from now on
    UNLUCKY = "unlucky"  # engines were killed with it inside, several times
    EXPIRED = "expired"  # its deadline passed
    FULL = "full"  # engines have no room for it
    REPLACED = "replaced"  # by another model, which it was not made for
    NO_PIXELS = "no pixels"  # the front-end's shared memory can't be opened


class Unserved(Message, frozen=True):
    """A request has ended without a caption, for a reason that was found elsewhere."""

    id: int
    why: Why


class Beat(Message, frozen=True):
    """The sender lives; since when it has been in one step (`time.monotonic`), if in any."""

    step_since: float | None = None


class Found(Message, frozen=True):
    """The model's engine is whole: the port may open."""

    model: str


class FailedToStart(Message, frozen=True):
    """The process could not start; `reason` is told to the operator."""

    reason: str


class WorkerFacts(Struct, frozen=True):
    """What a worker runs. seconds: that a caption of the self-test took.

    slots: of each of its engines. engines: that it stands for.
    """

    engine: str
    precision: str
    runs_on: str
    provider: str
    self_test: str
    seconds: float | None
    device: str
    slots: int
    engines: int = 1

    @property
    def identity(self) -> str:
        """What captions depend on; the same for workers whose captions are the same."""
        return f"{self.engine} {self.precision}"


class WorkerReady(Message, frozen=True):
    """A worker serves."""

    facts: WorkerFacts


class FrontEndReady(Message, frozen=True):
    """A front-end serves."""


class Refused(Message, frozen=True):
    """All front-ends refuse an image that broke two workers, until then (`time.monotonic`)."""

    model: str
    digest: str
    until: float


class Drained(Message, frozen=True):
    """A front-end has finished what it accepted."""


class WorkerState(Struct, frozen=True):
    """A worker, for front-ends and for /health/ready."""

    model: str
    index: int
    epoch: int
    state: str
    pid: int | None
    restarts: int
    last_end: str | None
    facts: WorkerFacts | None


class Serving(Message, frozen=True):
    """Who serves, which images each model refuses until when, and how often the API keys were
    re-read.
    """

    workers: tuple[WorkerState, ...]
    refused: dict[str, dict[str, float]]
    reading: int


class Drain(Message, frozen=True):
    """Take nothing new, finish what was accepted."""


class Gone(Message, frozen=True):
    """A front-end has died: nobody waits for what it sent."""

    name: str


class Stop(Message, frozen=True):
    """Finish what was begun, then end."""


TO_WORKER = msgpack.Decoder(Hello | Generate | Cancel)
TO_FRONT_END = msgpack.Decoder(Output | StepFailed | Unserved)
TO_SUPERVISOR = msgpack.Decoder(
    Beat | Found | FailedToStart | WorkerReady | FrontEndReady | Refused | Drained
)
FROM_SUPERVISOR = msgpack.Decoder(Serving | Drain | Gone | Stop)
packed = msgpack.encode


def control_address(folder: Path) -> str:
    """Where the supervisor listens."""
    return f"ipc://{folder}/control"


def process_name(kind: str, index: int, epoch: int) -> str:
    """A process's identity in one of its lives. kind: front or worker."""
    return f"{kind}-{index}-{epoch}"


def worker_address(folder: Path, index: int, epoch: int) -> str:
    """Where a worker listens, in one of its lives."""
    return f"ipc://{folder}/{process_name('worker', index, epoch)}"


def tell(folder: Path, name: str, message: Message) -> None:
    """One message to the supervisor, from before or after a process's life proper."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.identity = f"{name}-{type(message).__name__}".encode()
    socket.connect(control_address(folder))
    socket.send(packed(message))
    socket.close(linger=2000)
