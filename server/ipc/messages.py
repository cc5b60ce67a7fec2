"""What the processes say to each other: small JSON messages over ZeroMQ.

In the folder of a run every worker binds `worker-<index>-<epoch>`, to which each
front-end connects, and the supervisor binds `control`. A worker that is started again takes the
next epoch, so that nothing that was queued for the dead one reaches it by itself.

| from | to | messages |
| --- | --- | --- |
| front-end | worker | hello (its pixel file), caption, cancel |
| worker | front-end | answer, error, expired, failed (a step) |
| worker, front-end | supervisor | beat, ready, failed (to start) |
| worker | supervisor | found (its engine is whole: the port may open) |
| front-end | supervisor | refused (an image that killed two workers), drained |
| supervisor | front-end | workers (who serves, and what all refuse), drain |
| supervisor | worker | gone (a front-end that has died), stop |
"""

import json
from pathlib import Path
from typing import Any

import zmq

Message = dict[str, Any]
BEAT_SECONDS = 0.5


def packed(message: Message) -> bytes:
    """As it is sent."""
    return json.dumps(message, separators=(",", ":")).encode()


def unpacked(data: bytes) -> Message:
    """As it was meant."""
    return json.loads(data)


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
    socket.identity = f"{name}-{message['op']}".encode()
    socket.connect(control_address(folder))
    socket.send(packed(message))
    socket.close(linger=2000)
