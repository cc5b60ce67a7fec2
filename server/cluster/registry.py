"""What ingresses and replicas of a cluster report: who serves, and which images are refused.

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

REPORT_SECONDS = 2.0
_HEARD_SECONDS = 7.0  # without a report, after which an actor counts as gone
_YOUNG_SECONDS = 5.0  # of the actor, in which not all may have reported

_NAME = "vignette"  # of the actor, and its namespace
Refused = dict[str, dict[str, float]]  # seconds left, by model and digest


class ReplicaReport(Struct, frozen=True):
    """Report of a replica: its worker's state, and the kind of its model (`ModelFiles.kind`)."""

    name: str
    node: str
    kind: str
    state: WorkerState


class IngressReport(Struct, frozen=True):
    """Report of an ingress: URL, `application.config_digest`, and the images that it refuses."""

    name: str
    url: str
    config_digest: bytes
    refused: Refused


class ClusterState(Struct, frozen=True):
    """What is known of the cluster. complete: False while reports may be missing."""

    replicas: tuple[ReplicaReport, ...]
    ingresses: tuple[IngressReport, ...]
    refused: Refused
    complete: bool


REPLICA_REPORT, INGRESS_REPORT = msgpack.Decoder(ReplicaReport), msgpack.Decoder(IngressReport)
CLUSTER_STATE = msgpack.Decoder(ClusterState)


class Registry:
    """The actor that collects reports; a cluster has one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._replicas: dict[str, tuple[float, ReplicaReport]] = {}
        self._ingresses: dict[str, tuple[float, IngressReport]] = {}
        self._refused: dict[str, Remembered] = {}

    def report_replica(self, report: bytes) -> None:
        """Record the report of a replica."""
        sent = REPLICA_REPORT.decode(report)
        self._replicas[sent.name] = self._clock(), sent

    def report_ingress(self, report: bytes) -> bytes:
        """Record the report of an ingress; return the `ClusterState`."""
        sent = INGRESS_REPORT.decode(report)
        now = self._clock()
        self._ingresses[sent.name] = now, sent
        for model, digests in sent.refused.items():
            kept = self._refused.setdefault(model, Remembered(QUARANTINE_SECONDS, self._clock))
            for digest, left in digests.items():
                kept.add(digest, now + left)
        return self.state()

    def state(self) -> bytes:
        """The `ClusterState` now, without actors that are gone."""
        now = self._clock()
        for heard in (self._replicas, self._ingresses):
            for name in [name for name, (at, _) in heard.items() if now - at > _HEARD_SECONDS]:
                del heard[name]
        refused = {
            model: {digest: until - now for digest, until in kept.items().items()}
            for model, kept in self._refused.items()
        }
        return msgpack.encode(
            ClusterState(
                tuple(sent for _, sent in self._replicas.values()),
                tuple(sent for _, sent in self._ingresses.values()),
                refused,
                now - self._began > _YOUNG_SECONDS,
            )
        )


def registry() -> ActorHandle:
    """The cluster's actor, created if missing. It outlives its creator and its node."""
    return (
        ray.remote(Registry)
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
