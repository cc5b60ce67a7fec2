"""Messages between processes: typed, in MessagePack over ZeroMQ.

In the run's folder, every worker binds `worker-<index>-<epoch>`, to which each front-end connects,
and the supervisor binds `control`. A restarted worker takes the next epoch, so that messages queued
for its predecessor do not reach it.

| from | to | messages |
| --- | --- | --- |
| front-end | worker | Hello, Generate, Cancel |
| worker | front-end | Output, StepFailed, Unserved: lists of them |
| worker, front-end | supervisor | Beat, FailedToStart |
| worker | supervisor | EngineVerified, WorkerReady |
| front-end | supervisor | FrontEndReady, FrontEndServes, Refused, Drained |
| supervisor | front-end | Serving, Drain |
| supervisor | worker | FrontEndLost, Stop |
"""

from enum import StrEnum
from pathlib import Path
from typing import Literal

import zmq
from msgspec import Struct, msgpack

from runtime.request import GenerationRequest, RequestOutput

ProcessKind = Literal["front", "worker"]
WorkerCondition = Literal["starting", "ready", "recovering", "failing"]
End = Literal["killed", "crashed", "stuck", "hung"]  # killed: from outside; hung: silent
BEAT_SECONDS = 0.5


class Message(Struct, frozen=True, tag=True):
    """Base class of the messages below."""


class Hello(Message, frozen=True):
    """A front-end's PixelStore: file, number of slots, and shape of a slot."""

    store: str
    slots: int
    shape: tuple[int, ...]


class Generate(Message, frozen=True):
    """A request without its pixels.

    slot: of the sender's store, with the pixels. alone: no other request may run beside it.
    digest: of its images.
    """

    request: GenerationRequest
    slot: int
    alone: bool
    digest: str = ""


class Cancel(Message, frozen=True):
    """Nobody waits for this request any more."""

    id: int


class Output(Message, frozen=True):
    """A new output of a request."""

    output: RequestOutput


class StepFailed(Message, frozen=True):
    """A step that included this request raised."""

    id: int


class FailureReason(StrEnum):
    """Reason a request ended without a caption."""

    POISONED = "poisoned"  # its image broke an engine twice, and is refused from now on
    LOST = "lost"  # engines were lost with it inside, several times
    EXPIRED = "expired"  # its deadline passed
    FULL = "full"  # engines have no room for it
    REPLACED = "replaced"  # the model was replaced by one that can't take it
    NO_PIXELS = "no pixels"  # the front-end's shared memory can't be opened


class Unserved(Message, frozen=True):
    """A request ended without a caption, for a reason that the sender found."""

    id: int
    reason: FailureReason


class Beat(Message, frozen=True):
    """Heartbeat. step_since: start of the current step (`time.monotonic`), None between steps."""

    step_since: float | None = None


class EngineVerified(Message, frozen=True):
    """The model's engine is complete; once all are, front-ends start."""

    model: str


class FailedToStart(Message, frozen=True):
    """The process could not start; `reason` is for the operator."""

    reason: str


class WorkerFacts(Struct, frozen=True):
    """What a worker runs.

    precision: and whatever else decides captions.
    self_test_seconds: for each caption of the self-test; None if there is none. slots,
    encode_batch: of each engine; images that a step encodes at most. engines: number of engines
    that the worker stands for.
    """

    engine: str
    precision: str
    runs_on: str
    provider: str
    self_test: str
    self_test_seconds: float | None
    slots: int
    encode_batch: int = 1
    engines: int = 1

    @property
    def identity(self) -> str:
        """Engine and precision: workers with the same identity give the same captions."""
        return f"{self.engine} {self.precision}"


class WorkerReady(Message, frozen=True):
    """A worker serves."""

    facts: WorkerFacts


class FrontEndReady(Message, frozen=True):
    """A front-end listens, and waits for the state of the workers."""


class FrontEndServes(Message, frozen=True):
    """A front-end has heard that all models serve: it refuses no request for that any more."""


class Refused(Message, frozen=True):
    """An image that crashed workers twice; all refuse it until `until` (`time.monotonic`)."""

    model: str
    digest: str
    until: float


class Drained(Message, frozen=True):
    """A front-end has finished the requests that it accepted."""


class WorkerState(Struct, frozen=True):
    """State of a worker, for front-ends and for /health/ready.

    device: the GPUs that it may use, as in CUDA_VISIBLE_DEVICES, or cpu; over Ray its nodes. state:
    failing, if it was lost and does not start again.
    """

    model: str
    device: str
    index: int
    epoch: int
    state: WorkerCondition
    pid: int | None
    restarts: int
    last_end: End | None
    facts: WorkerFacts | None

    @property
    def runs(self) -> WorkerFacts | None:
        """What it runs, while it serves."""
        return self.facts if self.state == "ready" else None


class Serving(Message, frozen=True):
    """State of all workers. refused: by model and digest, until when. reading: number of API key
    reloads.
    """

    workers: tuple[WorkerState, ...]
    refused: dict[str, dict[str, float]]
    reading: int


class Drain(Message, frozen=True):
    """Refuse new requests, finish those accepted."""


class FrontEndLost(Message, frozen=True):
    """A front-end has died: nobody waits for its requests."""

    name: str


class Stop(Message, frozen=True):
    """Finish the requests inside, then end."""


TO_WORKER = msgpack.Decoder(Hello | Generate | Cancel)
TO_FRONT_END = msgpack.Decoder(list[Output | StepFailed | Unserved])  # of a step
TO_SUPERVISOR = msgpack.Decoder(
    Beat | EngineVerified | FailedToStart | WorkerReady
    | FrontEndReady | FrontEndServes | Refused | Drained
)  # fmt: skip
FROM_SUPERVISOR = msgpack.Decoder(Serving | Drain | FrontEndLost | Stop)
packed = msgpack.encode


def control_address(folder: Path) -> str:
    """Address of the supervisor's socket."""
    return f"ipc://{folder}/control"


def process_name(kind: ProcessKind, index: int, epoch: int) -> str:
    """Name of a process in one epoch."""
    return f"{kind}-{index}-{epoch}"


def worker_address(folder: Path, index: int, epoch: int) -> str:
    """Address of a worker's socket in one epoch."""
    return f"ipc://{folder}/{process_name('worker', index, epoch)}"


def notify_supervisor(folder: Path, name: str, message: Message) -> None:
    """Send the supervisor one message over a new socket, before a process serves or as it fails."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.identity = f"{name}-{type(message).__name__}".encode()
    socket.connect(control_address(folder))
    socket.send(packed(message))
    socket.close(linger=2000)
