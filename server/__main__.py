"""`python -m server`: start, serve, drain on SIGTERM."""

import asyncio
import logging
import signal
import sys

import tornado.httpserver
import tornado.netutil

from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.opening import Prepared, prepare
from server.admission import State
from server.app import make_app
from server.service import Service, make_service
from server.settings import Settings, from_command_line

log = logging.getLogger("server")

_IDLE_SECONDS = 75  # a keep-alive connection without a request is closed after this
_BODY_SECONDS = 60  # for a body to come in
_HEADER_BYTES = 64 * 1024
_OTHER_BODY_BYTES = 64 * 1024  # of requests that are not for /caption, which sets its own limit


class CannotListen(VignetteError):
    """The port can't be opened."""


def main() -> int:
    """Run until told to stop; returns the exit status."""
    try:
        settings = from_command_line()
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)s %(message)s", force=True
        )
        prepared = prepare(settings.engine, settings.engine_config)  # before the port is open
        asyncio.run(serve(settings, prepared))
    except VignetteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def serve(settings: Settings, prepared: Prepared) -> None:
    """Listen, warm up, serve until SIGTERM or SIGINT, drain."""
    service = make_service(settings, lambda: Engine.start(prepared))
    stop = asyncio.create_task(_stop_event().wait())
    server = tornado.httpserver.HTTPServer(
        make_app(service),
        idle_connection_timeout=_IDLE_SECONDS,
        body_timeout=_BODY_SECONDS,
        max_header_size=_HEADER_BYTES,
        max_body_size=_OTHER_BODY_BYTES,
    )
    port = _listen(server, settings)
    start = asyncio.create_task(service.worker.start())
    await asyncio.wait({stop, start}, return_when=asyncio.FIRST_COMPLETED)
    if not stop.done():
        service.engine = start.result()
        service.admission.slots = service.engine.config.slots or 0
        service.admission.state = State.READY
        _announce(service, port)
        await stop
    await _drain(service, server)


def _stop_event() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; the second takes its default course, at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        loop.remove_signal_handler(number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def _listen(server: tornado.httpserver.HTTPServer, settings: Settings) -> int:
    try:
        sockets = tornado.netutil.bind_sockets(settings.port, settings.host, backlog=1024)
    except OSError as cause:
        raise CannotListen(
            f"can't listen on {settings.host}:{settings.port} ({cause.strerror}): choose another "
            "with --port, or stop what uses it"
        ) from cause
    server.add_sockets(sockets)
    return sockets[0].getsockname()[1]


def _announce(service: Service, port: int) -> None:
    engine = service.engine
    assert engine is not None
    log.info("model %s, %s", engine.manifest.model, engine.runs_on)
    host = service.settings.host
    shown = "localhost" if host in ("0.0.0.0", "127.0.0.1", "::", "::1") else host
    shown = f"[{shown}]" if ":" in shown else shown
    print(
        f"\nVignette is ready on http://{shown}:{port} - try:\n\n"
        f"  curl --data-binary @demo/samples/owl.png http://{shown}:{port}/caption\n",
        flush=True,
    )


async def _drain(service: Service, server: tornado.httpserver.HTTPServer) -> None:
    """Take nothing new, finish what was accepted, then let go."""
    service.admission.state = State.DRAINING
    log.info("draining %d requests", service.admission.inside)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.settings.drain_seconds
    while service.admission.inside and loop.time() < deadline:
        await asyncio.sleep(0.02)
    if service.admission.inside:
        log.warning("%d requests were not finished in time", service.admission.inside)
    server.stop()
    await server.close_all_connections()
    # An engine that is still being opened is not waited for: its thread ends with the process.
    await service.worker.stop(max(0.0, deadline - loop.time()) if service.engine else 0)
    service.decoders.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
