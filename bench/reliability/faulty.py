"""`python -m bench.reliability.faulty`: the service, with an engine that fails on some images.

No image makes a healthy engine fail, so a colour marks those that shall.
"""

import asyncio
import importlib
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime.engine import Engine
from runtime.execution.host import HostRunner
from server.models import ServedModel, served
from server.processes import local, worker
from server.settings import Settings, from_command_line
from server.telemetry.logs import configure

RED, GREEN = 255, 0  # the blue value selects the fault (`FAULTS`)


def _raise(runner: HostRunner, slot: int) -> None:
    raise RuntimeError("the engine fails, as it was asked to")


def _out_of_memory(runner: HostRunner, slot: int) -> None:
    raise MemoryError


def _nan(runner: HostRunner, slot: int) -> None:
    for cache in runner._arena:
        cache[slot] = np.nan


def _crash(runner: HostRunner, slot: int) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


FAULTS: dict[int, tuple[str, Callable[[HostRunner, int], None]]] = {
    10: ("an exception", _raise),
    20: ("out of memory", _out_of_memory),
    30: ("NaN", _nan),
    40: ("a crash", _crash),
}


def worker_main(
    settings: Settings, model: ServedModel, folder: Path, index: int, epoch: int
) -> None:
    """The engine worker's process, with faults injected."""
    start = Engine.start
    Engine.start = lambda prepared: _faulty(start(prepared))  # type: ignore[method-assign]
    worker.main(settings, model, folder, index, epoch)


def _faulty(engine: Engine) -> Engine:
    runner = engine.runner
    assert isinstance(runner, HostRunner)
    encode = runner.encode

    def faulty(pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        encode(pixels, slots)
        for image, [slot, *_] in zip(pixels, slots, strict=True):
            red, green, blue = (int(channel) for channel in image[:, 0, 0])
            if (red, green) == (RED, GREEN) and blue in FAULTS:
                FAULTS[blue][1](runner, slot)

    runner.encode = faulty  # type: ignore[method-assign]
    return engine


def main() -> None:
    """Serve until told to stop."""
    settings = from_command_line()
    configure(settings)
    if settings.ray is not None:
        from server.cluster import command

        ours = importlib.import_module("bench.reliability.faulty")  # as replicas import it
        command.serve(settings, ours.worker_main)
        return
    settings = settings.model_copy(update={"workers": 1})
    asyncio.run(local.run(settings, served(settings.engine), worker_main, [""]))


if __name__ == "__main__":
    main()
