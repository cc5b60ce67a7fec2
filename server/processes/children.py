"""The processes of a run, before they are started: engine workers and front-ends."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from server.models import ServedModel
from server.processes import frontend
from server.processes.child import Child
from server.processes.ports import Ports
from server.service import keys
from server.settings import Settings

_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # returns the memory of large bodies at once


def workers(
    settings: Settings,
    models: Sequence[ServedModel],
    folder: Path,
    main: Callable[..., Any],
    devices: Sequence[str],
) -> list[Child]:
    """One worker for each model and device.

    folder: of the run. main: entry point of a worker. devices: CUDA_VISIBLE_DEVICES of each worker;
    an empty string leaves the variable alone.
    """
    found: list[Child] = []
    for model in models:
        run = partial(main, settings, model, folder)
        for device in devices:
            variables = {"CUDA_VISIBLE_DEVICES": device} if device else {}
            found.append(Child("worker", len(found), run, model.name, variables))
    return found


def front_ends(
    settings: Settings, models: Sequence[ServedModel], folder: Path, ports: Ports
) -> list[Child]:
    """All front-ends, including the one for gRPC. They read the models' folders, and of the API
    keys the copy that the supervisor checked: one that starts later must know what the others do.
    """
    if settings.api_keys is not None:
        settings = settings.model_copy(update={"api_keys": folder / keys.CHECKED})
    main = partial(frontend.main, settings, tuple(models), folder, ports)
    return [
        Child("front", index, main, environment=_MEMORY)
        for index in range(settings.front_end_processes)
    ]
