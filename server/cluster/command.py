"""`vignette serve --ray`: deploy to a cluster, print the ingresses' URLs, and end when told to."""

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

from server.cluster.application import QUIET, config_digest, opened, replicas
from server.cluster.ingress import application_of
from server.cluster.registry import CLUSTER_STATE, ClusterState, registry
from server.models import ServedModel, served
from server.processes import worker
from server.processes.local import stop_event
from server.processes.supervisor import CannotStart
from server.service import keys
from server.settings import LOCAL, Settings
from server.system import check_listens
from server.telemetry.logs import flush

log = logging.getLogger(__name__)

INGRESS = "vignette"  # the application of ingresses
_ASK_SECONDS = 20.0
_END_SECONDS = 20.0  # for ingresses and engines to end after their accepted requests
_LOOK_SECONDS = 0.2
_ERROR = re.compile(r"[\w.]+: .")  # a line of a traceback that names the error


def serve(settings: Settings, worker_main: Callable[..., Any] = worker.main) -> None:
    """Deploy or update the service, and serve until a signal asks to end.

    worker_main: entry point of an engine worker.

    Raises EngineFolderError and CannotStart.
    """
    if settings.api_keys:
        keys.read(settings.api_keys)  # ingresses read them again; fail early here
    models = served(settings.engine)
    ours = settings.ray == LOCAL
    try:
        check_listens(settings.ray or LOCAL)  # Ray itself would try without end
        ray.init(settings.ray, include_dashboard=False if ours else None, logging_level="warning")
    except (OSError, RuntimeError, ValueError) as cause:
        raise CannotStart(f"--ray {settings.ray}: no cluster could be reached ({cause})") from cause
    try:
        ray_serve.start(proxy_location="Disabled", logging_config=QUIET)
        deploy(settings, models, worker_main)
        for url in ingresses(models):
            print(f"Vignette listens on {url}", flush=True)
        if not settings.ray_detach:
            asyncio.run(_told_to_stop())
            _end_in_time(models, settings.drain_seconds + _END_SECONDS)
    finally:
        ray.shutdown()


def deploy(
    settings: Settings, models: tuple[ServedModel, ...], worker_main: Callable[..., Any]
) -> None:
    """Deploy models and ingresses; existing ones are updated one by one.

    Ingresses stay open if `config_digest` has not changed. Raises CannotStart.
    """
    try:
        for model in models:
            name = application_of(model.name)
            ray_serve.run(replicas(settings, model, worker_main), name=name, route_prefix=None)
        names = tuple(model.name for model in models)
        if _ingress_digests() != {config_digest(settings, names)}:
            ray_serve.run(opened(settings, names), name=INGRESS, route_prefix=None)
    except RuntimeError as cause:  # the cause is deep in a traceback
        raise CannotStart(f"the cluster did not take the service: {_reason()}") from cause


def ingresses(models: tuple[ServedModel, ...]) -> list[str]:
    """URLs of the ingresses, once each model has a replica. Raises CannotStart if none opens."""
    end = time.monotonic() + _ASK_SECONDS
    wanted = {model.name for model in models}
    while time.monotonic() < end:
        state = _state()
        if state.ingresses and {report.state.model for report in state.replicas} >= wanted:
            return sorted({report.url for report in state.ingresses})
        time.sleep(_LOOK_SECONDS)
    raise CannotStart("no ingress opened: see the log of the cluster (ray logs)")


def end(models: tuple[ServedModel, ...]) -> None:
    """Close the ingresses, which finish accepted requests, and then the engines."""
    for name in (INGRESS, *(application_of(model.name) for model in models)):
        ray_serve.delete(name)
    ray.kill(registry())


def _end_in_time(models: tuple[ServedModel, ...], seconds: float) -> None:
    """End the service, or exit: Ray would wait long for a cluster that ended at the same moment."""
    ending = threading.Thread(target=end, args=(models,), daemon=True)
    ending.start()
    ending.join(seconds)
    if ending.is_alive():
        log.error("the cluster does not answer: what it still runs ends with it")
        flush()
        os._exit(1)


def _state() -> ClusterState:
    return CLUSTER_STATE.decode(ray.get(registry().state.remote(), timeout=_ASK_SECONDS))


def _ingress_digests() -> set[bytes]:
    """`config_digest` of the ingresses that are open; empty if their application does not run."""
    found = ray_serve.status().applications.get(INGRESS)
    if found is None or found.status is not ApplicationStatus.RUNNING:
        return set()
    return {ingress.config_digest for ingress in _state().ingresses}


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
        log.warning(
            "SIGHUP does nothing on a cluster: deploy again, and ingresses read the API keys"
        )

    await stop_event(hangup).wait()
