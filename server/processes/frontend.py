"""A front-end process: speaks HTTP on the shared port, and hears from the supervisor who serves."""

import asyncio
import gc
import logging
import resource
import socket
import sys
from pathlib import Path

import tornado.web
import zmq
import zmq.asyncio

from runtime.errors import VignetteError
from runtime.model import manifest as manifests
from runtime.model.tokenizer import CaptionTokenizer
from server.http.app import make_app, make_ops_app
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
    Refused,
    Serving,
    control_address,
    packed,
    process_name,
    tell,
)
from server.logs import configure
from server.metrics import count_as
from server.processes.ports import Ports
from server.processes.system import follow_parent
from server.service.admission import State
from server.service.service import Service, make_service
from server.settings import Settings

log = logging.getLogger(__name__)

_HEADER_BYTES = 56 * 1024  # a prompt of 4,096 characters takes 48 KiB in a query
_READ_BYTES = 64 * 1024  # of a body at a time
_OTHER_BODY_BYTES = 64 * 1024  # of requests that are not for /caption, which sets its own limit
_COLLECTIONS = 5_000, 20, 50  # objects to a young one, those to a middle one, to a full one
_OTHER_FILES = 256  # that are no connections: sockets to the other processes, libraries


def main(settings: Settings, folder: Path, ports: Ports, index: int, epoch: int) -> None:
    """The process: serve until told to drain."""
    follow_parent()
    name = process_name("front", index, epoch)
    configure(settings)
    count_as(f"front-{index}")
    try:
        with asyncio.Runner(loop_factory=few_at_a_time) as runner:
            runner.run(_serve(settings, folder, ports, index, epoch))
    except VignetteError as error:
        tell(folder, name, FailedToStart(str(error)))
        sys.exit(1)


async def _serve(settings: Settings, folder: Path, ports: Ports, index: int, epoch: int) -> None:
    manifest = manifests.read(settings.engine)
    tokenizer = CaptionTokenizer(settings.engine, manifest)
    service = make_service(settings, manifest, tokenizer, folder, index, epoch)
    servers = [listen(service, make_app(service), ports.public)]
    if ports.ops:
        servers.append(listen(service, make_ops_app(service), ports.ops))
    control = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    control.identity = process_name("front", index, epoch).encode()
    control.connect(control_address(folder))
    service.links.dispatcher.on_refused = lambda digest, until: control.send(
        packed(Refused(digest, until))
    )
    _settle_garbage()
    await control.send(packed(FrontEndReady()))
    beat = asyncio.create_task(_beat(control))
    hear = asyncio.create_task(_hear(control, service))
    try:
        await hear
        # Workers may still come and go while the last requests are finished.
        hear = asyncio.create_task(_hear(control, service))
        await _drain(service, servers)
        await control.send(packed(Drained()))
    finally:
        beat.cancel()
        hear.cancel()
        service.decoders.close()
        if service.tracer is not None:
            service.tracer.close()
        await service.links.close()
        control.close(linger=1000)


def _settle_garbage() -> None:
    """A full collection visits every object there is, with the event loop waiting: a quarter of a
    second with thousands of connections. What is here now stays; what comes dies young.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


def listen(service: Service, app: tornado.web.Application, sockets: list[socket.socket]) -> Server:
    """Serve on sockets; slow clients are cut off, and hold nothing but their connection."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = Server(
        app,
        late=service.late,
        unread=service.unread,
        most=max(1, min(service.settings.max_connections, files - _OTHER_FILES)),
        idle_connection_timeout=service.settings.header_seconds,
        body_timeout=service.settings.body_seconds,
        max_header_size=_HEADER_BYTES,
        max_body_size=_OTHER_BODY_BYTES,
        chunk_size=_READ_BYTES,
    )
    server.add_sockets(sockets)
    return server


def update(service: Service, serving: Serving) -> None:
    """Take what the supervisor says of workers, refused images and API keys."""
    service.workers = serving.workers
    service.read_keys(serving.reading)
    for digest, until in serving.refused.items():
        service.links.dispatcher.refuse(digest, until)
    for worker in serving.workers:
        service.metrics.restarts.labels(worker.index).set(worker.restarts)
    ready = [w for w in serving.workers if w.state == "ready" and w.facts is not None]
    ends = {w.index: w.last_end for w in serving.workers}
    service.links.update({(w.index, w.epoch) for w in ready}, ends)
    if ready:
        facts = [w.facts for w in ready if w.facts is not None]
        service.admission.slots = -(-sum(f.slots for f in facts) // service.settings.front_ends)
        if known := [f.seconds for f in facts if f.seconds]:
            service.admission.expect(service.settings.front_ends * min(known) / len(ready))
        if service.admission.state is State.STARTING:
            service.admission.state = State.READY


async def _hear(control: zmq.asyncio.Socket, service: Service) -> None:
    """Follow what the supervisor says, until it says to drain."""
    while True:
        match FROM_SUPERVISOR.decode(await control.recv()):
            case Drain():
                return
            case Serving() as serving:
                update(service, serving)


async def _beat(control: zmq.asyncio.Socket) -> None:
    while True:
        await control.send(packed(Beat()))
        await asyncio.sleep(BEAT_SECONDS)


async def _drain(service: Service, servers: list[Server]) -> None:
    """Take nothing new, finish what was accepted, then let go."""
    service.admission.state = State.DRAINING
    log.info("draining %d requests", service.admission.inside)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.settings.drain_seconds
    while service.admission.inside and loop.time() < deadline:
        await asyncio.sleep(0.02)
    if service.admission.inside:
        log.warning("%d requests were not finished in time", service.admission.inside)
    await asyncio.sleep(0.02)  # for the last answers to be written
    for server in servers:
        server.stop()
        await server.close_all_connections()
