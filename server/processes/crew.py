"""The processes of a run, before they are started: engine workers and front-ends."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from server.models import ServedModel
from server.processes import frontend
from server.processes.child import Child
from server.processes.ports import Ports
from server.settings import Settings

_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # large bodies go back to the system at once


def workers(
    settings: Settings,
    models: Sequence[ServedModel],
    folder: Path,
    main: Callable[..., Any],
    devices: Sequence[str],
) -> list[Child]:
    """Workers: of each model one on each device.

    folder: of the run. main: of a worker's process. devices: CUDA_VISIBLE_DEVICES of each; an empty
    string changes nothing.
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
    """As many as the settings say, that for gRPC included. They read the models' engine folders."""
    main = partial(frontend.main, settings, tuple(models), folder, ports)
    return [
        Child("front", index, main, environment=_MEMORY)
        for index in range(settings.front_end_processes)
    ]
