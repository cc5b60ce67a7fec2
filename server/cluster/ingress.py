"""An ingress: the front-ends of one node, under a supervisor, with relays in place of workers."""

import asyncio
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import zmq
import zmq.asyncio
from msgspec import msgpack
from msgspec.structs import replace
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from server.cluster.registry import (
    CLUSTER_STATE,
    REPORT_SECONDS,
    ClusterState,
    IngressReport,
    ReplicaReport,
    registry,
)
from server.cluster.relay import Relay
from server.ipc.messages import WorkerFacts, WorkerState, worker_address
from server.ipc.shared import RunFolder
from server.model_files import ModelFiles
from server.models import ServedModel
from server.processes.children import front_ends
from server.processes.ports import Ports
from server.processes.supervisor import CannotStart, Supervisor
from server.settings import Settings
from server.telemetry.logs import configure

log = logging.getLogger(__name__)

_FILES = msgpack.Decoder(ModelFiles)
_ENGINES = 8  # most for whose requests each front-end has room in shared memory
_LOOK_SECONDS = 0.5  # between look-ups of a model that is not there yet


def application_of(model: str) -> str:
    """Name of a model's application; its deployment has the model's name."""
    return f"vignette-{model}"


def _together(known: list[WorkerFacts]) -> WorkerFacts:
    """Facts of all replicas as of one worker. Different engines, as during an update, combine to an
    identity of their own, so that captions made meanwhile are cached for neither.
    """
    return replace(
        known[0],
        engine=" ".join(sorted({facts.engine for facts in known})),
        precision=" ".join(sorted({facts.precision for facts in known})),
        engines=len(known),
        slots=min(facts.slots for facts in known),
    )


class ModelRelay:
    """A model's relay, open while any replica serves. Each opening is an epoch, as of a worker."""

    def __init__(self, folder: Path, index: int, name: str, kind: str) -> None:
        self.name, self.kind = name, kind
        self._folder, self._index, self._epoch = folder, index, 0
        self._relay: asyncio.Task[None] | None = None

    @property
    def opened(self) -> bool:
        """Whether the relay takes requests."""
        return self._relay is not None

    def follow(self, replicas: Sequence[ReplicaReport]) -> WorkerState:
        """Open or close the relay; return the state of all replicas as that of one worker.

        Raises the error of a relay that has failed.
        """
        ready = [each.state for each in replicas if each.state.state == "ready"]
        if self._relay is not None and self._relay.done():
            self._relay.result()  # it ends only by an error
        if ready and not self.opened:
            self._epoch += 1
            self._relay = asyncio.create_task(self._serve())
        elif not ready:
            self.close()
        restarts = sum(each.state.restarts for each in replicas)
        known = [state.facts for state in ready if state.facts is not None]
        nodes = sorted({each.node for each in replicas})
        return WorkerState(
            model=self.name,
            device=f"{len(replicas)} replicas on {', '.join(nodes)}",
            index=self._index,
            epoch=self._epoch,
            state="ready" if known else "recovering" if self._epoch else "starting",
            pid=None,
            restarts=restarts,
            last_end=None,
            facts=_together(known) if known else None,
        )

    async def _serve(self) -> None:
        socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        socket.sndhwm = socket.rcvhwm = 0
        socket.bind(worker_address(self._folder, self._index, self._epoch))
        replicas = serve.get_deployment_handle(self.name, application_of(self.name))
        relay = Relay(socket, replicas, self.kind)
        try:
            await relay.run()
        finally:
            for number in list(relay.jobs):
                relay.cancel(number)
            socket.close(linger=0)

    def close(self) -> None:
        """Close the relay; front-ends send unanswered requests again once a replica serves."""
        if self._relay is not None:
            self._relay.cancel()
        self._relay = None


class Ingress:
    """A deployment with one replica on each node."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, models: tuple[str, ...], config_digest: bytes
    ) -> None:
        """Wait for the models, then listen. config_digest: see `application.config_digest`.

        Raises CannotListen, NoSharedMemory and CannotStart.
        """
        configure(settings)
        self._config_digest, self._registry = config_digest, registry()
        files = {name: await _files_of(name) for name in models}
        ports, run = Ports(settings), RunFolder()
        self._url = f"http://{_address(settings.host)}:{ports.number}"
        self._relays = [
            ModelRelay(run.path, index, name, each.kind)
            for index, (name, each) in enumerate(files.items())
        ]
        served = [
            ServedModel(name, each.write(run.path / "models" / str(index)), 1.0)
            for index, (name, each) in enumerate(files.items())
        ]
        # Their stores together have places for what the engines take at once, within bounds.
        engines = min(_ENGINES * settings.front_end_processes, settings.replicas[1])
        several = settings.model_copy(update={"workers": engines})
        children = front_ends(several, served, run.path, ports)
        self._supervisor = Supervisor(settings, list(models), run, [], children, ports)
        self._stale: str | None = None
        self._stop, ready = asyncio.Event(), asyncio.Event()
        self._supervisor.on_ready = ready.set
        self._running = asyncio.create_task(self._supervisor.run(self._stop))
        self._following = asyncio.create_task(self._follow())
        starting = asyncio.create_task(ready.wait())
        everything = {self._running, self._following, starting}
        await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
        starting.cancel()
        for task in (self._running, self._following):
            if task.done():
                task.result()
                raise CannotStart("the ingress ended as it opened: see the log")
        log.info("an ingress is open on %s", self._url)

    async def __del__(self) -> None:
        """Finish accepted requests, when Serve ends this ingress."""
        if not hasattr(self, "_following"):
            return  # it could not start
        self._stop.set()
        await self._running
        self._following.cancel()
        for relay in self._relays:
            relay.close()

    def check_health(self) -> None:
        """Raise CannotStart if the ingress has to be opened anew."""
        if self._running.done() or self._following.done():
            raise CannotStart("the ingress's supervisor has ended: see the log")
        if self._stale is not None:
            raise CannotStart(
                f"{self._stale} was replaced by a model of other tokens or images: the ingress "
                "opens again for that"
            )

    async def _follow(self) -> None:
        """Every other second report to the registry, and learn the cluster's state from it."""
        name = ray.get_runtime_context().get_actor_id() or ""
        while True:
            now = time.monotonic()
            refused = {
                model: {digest: until - now for digest, until in kept.items().items()}
                for model, kept in self._supervisor.refused.items()
            }
            report = msgpack.encode(IngressReport(name, self._url, self._config_digest, refused))
            try:
                known = CLUSTER_STATE.decode(await self._registry.report_ingress.remote(report))
            except RayError as error:
                log.warning("this ingress hears nothing new, for now: %r", error)
            else:
                await self._learn(known)
            await asyncio.sleep(REPORT_SECONDS)

    async def _learn(self, known: ClusterState) -> None:
        states = []
        for relay in self._relays:
            replicas = [each for each in known.replicas if each.state.model == relay.name]
            if not known.complete and not replicas and relay.opened:
                return  # its replicas have not been heard of yet
            ours = [each for each in replicas if each.kind == relay.kind]
            if replicas and not ours:
                self._stale = relay.name
            states.append(relay.follow(ours))
        now = time.monotonic()
        refused = {
            model: {digest: now + left for digest, left in digests.items()}
            for model, digests in known.refused.items()
            if model in self._supervisor.refused
        }
        await self._supervisor.learn(tuple(states), refused)


def _address(host: str) -> str:
    """Address under which a host that is listened on is reached."""
    if host in ("0.0.0.0", "::"):
        host = ray.util.get_node_ip_address()
    return f"[{host}]" if ":" in host else host


async def _files_of(model: str) -> ModelFiles:
    """Get a model's files from a replica, as soon as there is one."""
    while True:
        try:
            replicas = serve.get_deployment_handle(model, application_of(model))
            return _FILES.decode(await replicas.model_files.remote())
        except RayServeException as error:
            log.info("%s is not there yet (%s)", model, error)
            await asyncio.sleep(_LOOK_SECONDS)
