"""A front-end process: serves HTTP on the shared port, or gRPC, and learns which workers serve."""

import asyncio
import gc
import logging
import multiprocessing
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import zmq
import zmq.asyncio

from runtime.errors import VignetteError
from runtime.model import manifest as manifests
from runtime.model.tokenizer import CaptionTokenizer
from server.addresses import networks
from server.grpc.listening import GrpcServer
from server.grpc.listening import start as start_grpc
from server.http.app import Application, make_app, make_ops_app
from server.http.client_stream import HEAD_BYTES
from server.http.listening import Server
from server.http.loop import few_at_a_time
from server.ipc.messages import (
    BEAT_SECONDS,
    FROM_SUPERVISOR,
    Beat,
    Drain,
    Drained,
    FailedToStart,
    FrontEndReady,
    FrontEndServes,
    Refused,
    Serving,
    control_address,
    notify_supervisor,
    packed,
    process_name,
)
from server.models import ServedModel
from server.processes.ports import Ports
from server.service.admission import State
from server.service.assembly import make_service
from server.service.service import Service
from server.settings import Settings
from server.system import follow_parent, give_way, limit_memory
from server.telemetry.logs import configure
from server.telemetry.metrics import count_as

log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024  # of a body at a time
_OTHER_BODY_BYTES = 64 * 1024  # of requests that do not caption
_COLLECTIONS = 5_000, 20, 50  # gc: objects per young one, young per middle, middle per full
_GRPC_MEMORY = 4 * 2**30  # bytes of address space: incoming messages are not counted
_OTHER_FILES = 256  # files besides connections: sockets to other processes, libraries


def main(
    settings: Settings,
    models: tuple[ServedModel, ...],
    folder: Path,
    ports: Ports,
    index: int,
    epoch: int,
) -> None:
    """Entry point of the process: serve until told to drain."""
    follow_parent()
    name = process_name("front", index, epoch)
    configure(settings)
    count_as(folder, f"front-{index}")
    try:
        with asyncio.Runner(loop_factory=few_at_a_time) as runner:
            service = partial(_service, settings, models, folder, index, epoch)
            runner.run(_serve(service, folder, ports, name))
    except VignetteError as error:
        notify_supervisor(folder, name, FailedToStart(str(error)))
        sys.exit(1)
    finally:  # whatever ended it: Python would wait for its decoders, which ignore SIGTERM
        for decoder in multiprocessing.active_children():
            decoder.kill()


def _service(
    settings: Settings, models: tuple[ServedModel, ...], folder: Path, index: int, epoch: int
) -> Service:
    known = {}
    for model in models:
        manifest = manifests.read(model.engine)
        known[model.name] = manifest, CaptionTokenizer(model.engine, manifest)
    return make_service(settings, known, folder, index, epoch)


async def _serve(make: Callable[[], Service], folder: Path, ports: Ports, name: str) -> None:
    service = make()
    servers, grpc = [], None
    if service.index < service.settings.front_ends:
        servers.append(listen(service, make_app(service), ports.public))
        if ports.ops:
            servers.append(listen(service, make_ops_app(service), ports.ops))
    else:  # the last one: a flood of gRPC frames must not slow down HTTP
        give_way()
        stores = sum(model.store.size for model in service.models.values())
        limit_memory(_GRPC_MEMORY + stores, service.settings.decode_memory_mb * 2**20 + stores)
        grpc = await start_grpc(service)
    control = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    control.identity = name.encode()
    control.connect(control_address(folder))
    for model in service.models.values():
        model.links.dispatcher.on_refused = partial(_tell_refused, control, model.name)
    _settle_garbage()
    await control.send(packed(FrontEndReady()))
    beat = asyncio.create_task(_beat(control))
    hear = asyncio.create_task(_hear(control, service, grpc))
    try:
        await hear
        # Workers may still come and go while the last requests are finished.
        hear = asyncio.create_task(_hear(control, service, grpc))
        await _drain(service, servers, grpc)
        await control.send(packed(Drained()))
    finally:
        beat.cancel()
        hear.cancel()
        service.decoders.close()
        if service.tracer is not None:
            service.tracer.close()
        for model in service.models.values():
            await model.links.close()
        control.close(linger=1000)


def _settle_garbage() -> None:
    """Exclude present objects from garbage collection and make full ones rare: they visit every
    object while the event loop waits, a quarter of a second with thousands of connections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


def listen(service: Service, app: Application, sockets: list[socket.socket]) -> Server:
    """Serve on sockets; slow clients are disconnected, and hold only a connection until then."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = Server(
        app,
        connections=app.connections,
        proxies=networks(service.settings.trusted_proxies),
        share=service.settings.front_end_share,
        most=max(1, min(service.settings.max_connections, files - _OTHER_FILES)),
        idle_connection_timeout=service.settings.header_seconds,
        body_timeout=service.settings.body_seconds,
        max_header_size=HEAD_BYTES,
        max_body_size=_OTHER_BODY_BYTES,
        chunk_size=_READ_BYTES,
    )
    server.add_sockets(sockets)
    return server


def update(service: Service, serving: Serving) -> None:
    """Apply the supervisor's state of workers, refused images and API keys."""
    service.workers = serving.workers
    if service.key_reader is not None:
        service.key_reader.read(serving.reading)
    for worker in serving.workers:
        service.metrics.restarts.labels(worker.model, worker.index).set(worker.restarts)
    for name, model in service.models.items():
        for digest, until in serving.refused.get(name, {}).items():
            model.links.dispatcher.refuse(digest, until)
        ours = [worker for worker in serving.workers if worker.model == name]
        model.update(ours, service.settings.front_end_processes)
    service.share_devices()


async def _hear(control: zmq.asyncio.Socket, service: Service, grpc: GrpcServer | None) -> None:
    """Apply the supervisor's messages until told to drain."""
    told = False
    while True:
        match FROM_SUPERVISOR.decode(await control.recv()):
            case Drain():
                return
            case Serving() as serving:
                update(service, serving)
                if grpc is not None:
                    grpc.tell(service.serves)
                if service.state is State.READY and not told:
                    told = True
                    await control.send(packed(FrontEndServes()))


def _tell_refused(
    control: zmq.asyncio.Socket, model: str, digest: str, until: float
) -> Awaitable[object]:
    return control.send(packed(Refused(model, digest, until)))


async def _beat(control: zmq.asyncio.Socket) -> None:
    while True:
        await control.send(packed(Beat()))
        await asyncio.sleep(BEAT_SECONDS)


async def _drain(service: Service, servers: list[Server], grpc: GrpcServer | None) -> None:
    """Refuse new requests, finish those accepted, then close all connections."""
    service.drain()
    if grpc is not None:
        grpc.tell(False)
    log.info("draining %d requests", service.inside)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.settings.drain_seconds
    while service.inside and loop.time() < deadline:
        await asyncio.sleep(0.02)
    if service.inside:
        log.warning("%d requests were not finished in time", service.inside)
    await asyncio.sleep(0.02)  # for the last answers to be written
    if grpc is not None:
        await grpc.stop()
    for server in servers:
        server.stop()
        await server.close_all_connections()
