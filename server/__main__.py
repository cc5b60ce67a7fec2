"""`vignette serve`: settings, then the supervisor until it is told to stop."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from importlib.util import find_spec

from runtime.errors import ProviderError, VignetteError
from runtime.planning.config import AUTO, NVIDIA, serves_gpus
from runtime.providers.gpu import Gpu, visible_gpus
from server.models import served
from server.processes import local, worker
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
    devices = _devices(settings)
    together = max(map(devices.count, devices)) if any(devices) else 1
    models = served(settings.engine, together)
    settings = settings.model_copy(update={"workers": len(devices)})  # sizes the pixel stores
    await local.run(settings, models, worker.main, devices)


def _serve_on_ray(settings: Settings) -> None:
    if find_spec("ray") is None or find_spec("ray.serve") is None:
        raise InvalidSettings("--ray needs Ray: install vignette with the extras [cpu,ray]")
    from server.cluster.command import serve

    serve(settings)


def _devices(settings: Settings) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each worker of a model: the GPUs in turn; empty on the CPU."""
    gpus: list[Gpu] = []
    if settings.provider in NVIDIA:
        gpus = visible_gpus()
    elif settings.provider == AUTO and serves_gpus():
        with contextlib.suppress(ProviderError):  # the worker logs what auto takes instead
            gpus = visible_gpus()
    if not gpus:
        return [""] * (settings.workers or 1)
    # The visible GPUs are the first ones that the variable names.
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [g.uuid if g.is_instance else str(g.index) for g in gpus]
    workers = settings.workers or len(gpus)
    return [names[number % len(gpus)].strip() for number in range(workers)]


if __name__ == "__main__":
    sys.exit(main())
