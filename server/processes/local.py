"""A run on this machine alone: workers and front-ends under one supervisor."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from server.ipc.shared import RunFolder
from server.model_files import ModelFiles
from server.models import ServedModel
from server.processes.children import front_ends, workers
from server.processes.ports import Ports
from server.processes.supervisor import Supervisor
from server.settings import Settings
from server.system import OPERATORS_SIGNALS
from server.telemetry.logs import flush

log = logging.getLogger(__name__)

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)


async def run(
    settings: Settings,
    models: Sequence[ServedModel],
    worker_main: Callable[..., Any],
    devices: Sequence[str],
) -> None:
    """Serve until a signal asks to end. devices: see `children.workers`.

    Raises CannotListen, EngineFolderError, NoSharedMemory or CannotStart.
    """
    files = [ModelFiles.of(model.engine, model.fingerprint) for model in models]
    ports, folder = Ports(settings), RunFolder()
    kept = [
        replace(model, engine=each.write(folder.path / "models" / str(number)))
        for number, (model, each) in enumerate(zip(models, files, strict=True))
    ]
    supervisor = Supervisor(
        settings,
        [model.name for model in models],
        folder,
        workers(settings, models, folder.path, worker_main, devices),
        front_ends(settings, kept, folder.path, ports),
        ports,
    )
    supervisor.on_ready = lambda: announce(settings, ports)
    await supervisor.run(stop_event(supervisor.read_keys))


def announce(settings: Settings, ports: Ports) -> None:
    """Print the service's URL and an example request, or log the URL if the log is JSON."""
    host, port = settings.host, ports.number
    shown = "localhost" if host in ("0.0.0.0", "127.0.0.1", "::", "::1") else host
    shown = f"[{shown}]" if ":" in shown else shown
    if settings.log_format == "json":  # a program reads the output
        log.info("ready on http://%s:%d", shown, port)
        return
    flush()
    with suppress(OSError):  # nobody reads it, or the disk is full
        print(
            f"\nVignette is ready on http://{shown}:{port} - try:\n\n"
            f"  curl --data-binary @demo/samples/owl.png http://{shown}:{port}/caption\n",
            flush=True,
        )


def stop_event(on_hangup: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Event:
    """An event set by a signal that asks to end; another one then has its default effect.

    on_hangup: called on SIGHUP. The other operators' signals are only logged.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()  # keeps tasks from being collected before they end

    def on_signal() -> None:
        for number in _ENDING:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stop.set()

    def hangup() -> None:
        task = loop.create_task(on_hangup())
        running.add(task)
        task.add_done_callback(running.discard)

    for number in OPERATORS_SIGNALS:
        if number in _ENDING:
            loop.add_signal_handler(number, on_signal)
        elif number is signal.SIGHUP:
            loop.add_signal_handler(number, hangup)
        else:
            loop.add_signal_handler(number, log.warning, "%s does nothing here", number.name)
    return stop
