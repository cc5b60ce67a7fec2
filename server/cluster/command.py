"""`vignette serve --ray`: deploy to a cluster, print the doors' URLs, and end when told to."""

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports usage by default
# For a cluster that is started here: the default of ten loops a second takes 3 % of a core.
os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")

import ray
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus

from server.cluster.application import QUIET, made_of, opened, replicas
from server.cluster.door import application_of
from server.cluster.notices import KNOWN, Known, notices
from server.logs import flush
from server.models import ServedModel, served
from server.processes import worker
from server.processes.local import stop_event
from server.processes.supervisor import CannotStart
from server.service import keys
from server.settings import LOCAL, Settings

log = logging.getLogger(__name__)

DOORS = "vignette"  # the application of doors
_ASK_SECONDS = 20.0
_END_SECONDS = 20.0  # for doors and engines to end after their accepted requests
_LOOK_SECONDS = 0.2
_ERROR = re.compile(r"[\w.]+: .")  # a line of a traceback that names the error


def serve(settings: Settings, worker_main: Callable[..., Any] = worker.main) -> None:
    """Deploy or update the service, and serve until a signal asks to end.

    worker_main: entry point of an engine worker.

    Raises EngineFolderError and CannotStart.
    """
    if settings.api_keys:
        keys.read(settings.api_keys)  # doors read them again; fail early here
    models = served(settings.engine)
    ours = settings.ray == LOCAL
    try:
        ray.init(settings.ray, include_dashboard=False if ours else None, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as cause:
        raise CannotStart(f"--ray {settings.ray}: no cluster could be reached ({cause})") from cause
    try:
        ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
        deploy(settings, models, worker_main)
        for url in doors(models):
            print(f"Vignette has a door on {url}", flush=True)
        if not settings.ray_detach:
            asyncio.run(_told_to_stop())
            _end_in_time(models, settings.drain_seconds + _END_SECONDS)
    finally:
        ray.shutdown()


def deploy(
    settings: Settings, models: tuple[ServedModel, ...], worker_main: Callable[..., Any]
) -> None:
    """Deploy models and doors; existing ones are updated one by one.

    Doors stay open if `made_of` has not changed. Raises CannotStart.
    """
    try:
        for model in models:
            name = application_of(model.name)
            ray_serve.run(replicas(settings, model, worker_main), name=name, route_prefix=None)
        names = tuple(model.name for model in models)
        if _doors_made_of() != {made_of(settings, names)}:
            ray_serve.run(opened(settings, names), name=DOORS, route_prefix=None)
    except RuntimeError as cause:  # the cause is deep in a traceback
        raise CannotStart(f"the cluster did not take the service: {_reason()}") from cause


def doors(models: tuple[ServedModel, ...]) -> list[str]:
    """URLs of the doors, once each model has a replica. Raises CannotStart if none open in time."""
    end = time.monotonic() + _ASK_SECONDS
    wanted = {model.name for model in models}
    while time.monotonic() < end:
        known = _known()
        if known.doors and {notice.state.model for notice in known.replicas} >= wanted:
            return sorted({notice.url for notice in known.doors})
        time.sleep(_LOOK_SECONDS)
    raise CannotStart("no door opened: see the log of the cluster (ray logs)")


def end(models: tuple[ServedModel, ...]) -> None:
    """Close the doors, which finish accepted requests, and then the engines."""
    for name in (DOORS, *(application_of(model.name) for model in models)):
        ray_serve.delete(name)
    ray.kill(notices())


def _end_in_time(models: tuple[ServedModel, ...], seconds: float) -> None:
    """End the service, or exit: Ray would wait long for a cluster that ended at the same moment."""
    ending = threading.Thread(target=end, args=(models,), daemon=True)
    ending.start()
    ending.join(seconds)
    if ending.is_alive():
        log.error("the cluster does not answer: what it still runs ends with it")
        flush()
        os._exit(1)


def _known() -> Known:
    return KNOWN.decode(ray.get(notices().known.remote(), timeout=_ASK_SECONDS))


def _doors_made_of() -> set[bytes]:
    """`made_of` of the doors that are open; empty if their application does not run."""
    found = ray_serve.status().applications.get(DOORS)
    if found is None or found.status is not ApplicationStatus.RUNNING:
        return set()
    return {door.made_of for door in _known().doors}


def _reason() -> str:
    """Cause of a failed deployment: the last error line of the first traceback found."""
    for application in ray_serve.status().applications.values():
        for deployment in application.deployments.values():
            lines = [line for line in deployment.message.splitlines() if _ERROR.match(line)]
            if lines:
                return lines[-1]
    return "see its log (ray logs)"


async def _told_to_stop() -> None:
    async def hangup() -> None:
        log.warning("SIGHUP does nothing on a cluster: deploy again, and doors read the API keys")

    await stop_event(hangup).wait()
