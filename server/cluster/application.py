"""The applications that Ray Serve imports: one for each model, and one for the ingresses.

In a file for `serve deploy`, with settings as arguments (those of `vignette serve`, with
underscores):

    applications:
      - name: vignette-git-base        # vignette- and the model's name
        import_path: server.cluster.application:model
        args: {engine: engines/git-base, ray_replicas: 1-8, ray_cores: 8}
      - name: vignette
        import_path: server.cluster.application:ingresses
        args: {engine: engines/git-base, host: 0.0.0.0}
"""

import hashlib
import time
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from runtime.planning.config import MOST_SLOTS, NVIDIA, SLOTS
from server.cluster.ingress import Ingress
from server.cluster.replica import Replica
from server.models import ServedModel, served
from server.processes import worker
from server.processes.supervisor import CannotStart
from server.settings import Settings

_CORES = 4  # of an engine, if nodes have as many
QUIET = {"log_level": "WARNING", "enable_access_log": False}
# Requests need no threads besides the event loop that serves them.
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_EACH = {"health_check_period_s": 2, "health_check_timeout_s": 20, "logging_config": QUIET}
_LOOK_SECONDS = 1.0


def model(args: Settings) -> Application:
    """The application of the model that the settings name, or of the first of several."""
    return replicas(args, served(args.engine)[0])


def replicas(settings: Settings, model: ServedModel, worker_main: Any = worker.main) -> Application:
    """The application of one model. Raises CannotStart.

    An update stops a replica before it starts the next, because a cluster of fixed size may never
    have room for both. With a single replica, requests wait meanwhile.
    """
    needed = _resources(settings)
    cores = int(needed.get("num_cpus", 0))
    settings = settings.model_copy(update={"workers": 1, "threads": settings.threads or cores})
    slots = settings.slots or (MOST_SLOTS if "num_gpus" in needed else SLOTS)
    least, most = settings.replicas
    scaled: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=slots,
            look_back_period_s=10,
            upscale_delay_s=5,
            downscale_delay_s=60,
        )
        scaled = {"autoscaling_config": scaling}
    return serve.deployment(Replica).options(
        name=model.name,
        ray_actor_options=_actor(needed),
        max_ongoing_requests=2 * slots,  # so that the next requests are there when slots are freed
        max_queued_requests=settings.max_queue,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        **scaled,
        **_EACH,
    ).bind(settings, model, worker_main, 2 * slots)  # fmt: skip


def ingresses(args: Settings) -> Application:
    """The application of the ingresses for the models that the settings name."""
    return opened(args, tuple(model.name for model in served(args.engine)))


def opened(settings: Settings, models: tuple[str, ...]) -> Application:
    """The application of the ingresses for these models."""
    scaled: dict[str, Any] = {"num_replicas": settings.ray_ingresses}
    if settings.ray_ingresses is None:
        scaling = AutoscalingConfig(
            min_replicas=1,
            max_replicas=10_000,
            policy=AutoscalingPolicy(policy_function=one_for_each_node),
        )
        scaled = {"autoscaling_config": scaling}
    return serve.deployment(Ingress).options(
        name="Ingress",
        ray_actor_options=_actor({"num_cpus": 0}),
        max_replicas_per_node=1,
        graceful_shutdown_timeout_s=settings.drain_seconds + 10,
        **scaled,
        **_EACH,
    ).bind(settings, models, config_digest(settings, models))  # fmt: skip


def config_digest(settings: Settings, models: tuple[str, ...]) -> bytes:
    """Digest of settings, models and API keys; if it differs, ingresses are opened anew.

    Ingresses do not know the engines, but have room for so many: other settings are left out.
    """
    engines = {"engine", "ray", "ray_cores", "ray_detach", "provider", "precision"}
    keys = settings.api_keys.read_bytes() if settings.api_keys else b""
    known = settings.model_dump_json(exclude=engines).encode() + repr(models).encode()
    return hashlib.sha256(known + keys).digest()


def one_for_each_node(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Autoscaling policy: as many replicas as there are live nodes."""
    state = context.policy_state
    now = time.monotonic()
    if now - state.get("looked", 0.0) > _LOOK_SECONDS:
        nodes = sum(node["Alive"] for node in ray.nodes())
        state = {"looked": now, "nodes": nodes}
    return state["nodes"], state


def _actor(needed: dict[str, float]) -> dict[str, Any]:
    return {**needed, "runtime_env": {"env_vars": _ENVIRONMENT}}


def _resources(settings: Settings) -> dict[str, float]:
    """Resources of a replica: a GPU, or cores. Raises CannotStart."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = any(node.get("GPU", 0) for node in there)
    if settings.provider in NVIDIA or (settings.provider == "auto" and gpus):
        if not gpus:
            raise CannotStart(f"--provider {settings.provider}: the cluster has no GPU")
        return {"num_gpus": 1, "num_cpus": 0}
    most = int(max((node.get("CPU", 0) for node in there), default=0))
    cores = settings.ray_cores or min(_CORES, most)
    if not cores or cores > most:
        raise CannotStart(
            f"an engine takes {cores or _CORES} cores (--ray-cores), and no node of the cluster "
            f"has more than {most}"
        )
    return {"num_cpus": cores}
