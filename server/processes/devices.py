"""Which device each engine worker runs on."""

import contextlib
import os

from runtime.errors import ProviderError
from runtime.planning.config import AUTO, NVIDIA, serves_gpus
from runtime.providers.gpu import Gpu, visible_gpus
from server.settings import Settings


def devices_of_workers(settings: Settings) -> list[str]:
    """CUDA_VISIBLE_DEVICES for each worker of a model: the GPUs in turn; empty on the CPU.

    Raises ProviderError if NVIDIA's driver can't be asked for the GPUs that the settings want.
    """
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
