"""`vignette serve`: settings, then the supervisor until it is told to stop."""

import asyncio
import logging
import os
import signal
import sys
from importlib.util import find_spec

from runtime.errors import VignetteError
from server.models import served
from server.processes import local, worker
from server.processes.devices import devices_of_workers
from server.service import keys
from server.settings import InvalidSettings, Settings, from_command_line, unknown_variables
from server.system import raise_file_limit
from server.telemetry.logs import configure

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run until told to stop; return the exit status."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it has the API keys read again
    try:
        settings = from_command_line(arguments)
        configure(settings)
        for unknown in unknown_variables(os.environ):
            log.warning(unknown)
        raise_file_limit()
        if settings.ray is None:
            asyncio.run(_supervise(settings))
        else:
            _serve_on_ray(settings)
    except (VignetteError, OSError) as error:  # of the system: no inodes, no files
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


async def _supervise(settings: Settings) -> None:
    if settings.api_keys:
        keys.read(settings.api_keys)  # the supervisor reads them again; fail early here
    devices = devices_of_workers(settings)
    together = max(map(devices.count, devices)) if any(devices) else 1
    models = served(settings.engine, together)
    settings = settings.model_copy(update={"workers": len(devices)})  # sizes the pixel stores
    await local.run(settings, models, worker.main, devices)


def _serve_on_ray(settings: Settings) -> None:
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise InvalidSettings("--ray needs Ray: install vignette with the extras [cpu,ray]")
    from server.cluster.command import serve

    serve(settings)


if __name__ == "__main__":
    sys.exit(main())
