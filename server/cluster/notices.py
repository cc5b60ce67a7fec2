"""Notices between doors and replicas of a cluster: who serves, and which images are refused.

Each sends all that it knows every other second, so that nothing is lost when this actor dies. Times
are sent as seconds left, because machines have different clocks.
"""

import time
from collections.abc import Callable

import ray
from msgspec import Struct, msgpack
from ray.actor import ActorHandle

from server.ipc.dispatcher import QUARANTINE_SECONDS
from server.ipc.messages import WorkerState
from server.ipc.remembered import Remembered

TELL_SECONDS = 2.0
_HEARD_SECONDS = 7.0  # without a notice, after which a sender counts as gone
_YOUNG_SECONDS = 5.0  # of the actor, in which not all senders may have been heard of

_NAME = "vignette"  # of the actor, and its namespace
Refused = dict[str, dict[str, float]]  # seconds left, by model and digest


class ReplicaNotice(Struct, frozen=True):
    """Notice of a replica: its worker's state, and the kind of its model (`Card.kind`)."""

    name: str
    node: str
    kind: str
    state: WorkerState


class DoorNotice(Struct, frozen=True):
    """Notice of a door: its URL, its `application.made_of`, and the images that it refuses."""

    name: str
    url: str
    made_of: bytes
    refused: Refused


class Known(Struct, frozen=True):
    """What is known of the cluster. complete: False while senders may be missing."""

    replicas: tuple[ReplicaNotice, ...]
    doors: tuple[DoorNotice, ...]
    refused: Refused
    complete: bool


REPLICA, DOOR = msgpack.Decoder(ReplicaNotice), msgpack.Decoder(DoorNotice)
KNOWN = msgpack.Decoder(Known)


class Notices:
    """The actor that collects notices; a cluster has one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._replicas: dict[str, tuple[float, ReplicaNotice]] = {}
        self._doors: dict[str, tuple[float, DoorNotice]] = {}
        self._refused: dict[str, Remembered] = {}

    def replica(self, notice: bytes) -> None:
        """Record the notice of a replica."""
        told = REPLICA.decode(notice)
        self._replicas[told.name] = self._clock(), told

    def door(self, notice: bytes) -> bytes:
        """Record the notice of a door; return what is `Known`."""
        told = DOOR.decode(notice)
        now = self._clock()
        self._doors[told.name] = now, told
        for model, digests in told.refused.items():
            kept = self._refused.setdefault(model, Remembered(QUARANTINE_SECONDS, self._clock))
            for digest, left in digests.items():
                kept.add(digest, now + left)
        return self.known()

    def known(self) -> bytes:
        """What is `Known` now, without senders that are gone."""
        now = self._clock()
        for heard in (self._replicas, self._doors):
            for name in [name for name, (at, _) in heard.items() if now - at > _HEARD_SECONDS]:
                del heard[name]
        refused = {
            model: {digest: until - now for digest, until in kept.items().items()}
            for model, kept in self._refused.items()
        }
        return msgpack.encode(
            Known(
                tuple(told for _, told in self._replicas.values()),
                tuple(told for _, told in self._doors.values()),
                refused,
                now - self._began > _YOUNG_SECONDS,
            )
        )


def notices() -> ActorHandle:
    """The cluster's actor, created if missing. It outlives its creator and its node."""
    return (
        ray.remote(Notices)
        .options(
            name=_NAME,
            namespace=_NAME,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
        )
        .remote()
    )
