"""Several engines on one GPU, each in a process of its own, as `--workers` makes them."""

import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.common.timing import pictures
from bench.load import arrivals
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

_READY_SECONDS = 300


def images_per_second(folder: Path, workers: int, images: int) -> float:
    """Throughput of `workers` engines together, each captioning `images`, as uneven as COCO's."""
    context = get_context("spawn")
    barrier, spans = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(folder, 1 / workers, images, barrier, spans))
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("an engine failed beside others, see above")
    starts, ends = zip(*(spans.get() for _ in processes), strict=True)
    return workers * images / (max(ends) - min(starts))


def _run(folder: Path, share: float, images: int, barrier: Any, spans: Any) -> None:
    engine = Engine.open(folder, EngineConfig(provider="cuda", memory_share=share))
    work = arrivals.coco_jobs(pictures(16, engine.manifest.sizes.pixels), images)

    engine.run(arrivals.requests(engine, work[: 2 * engine.slots]))
    barrier.wait(_READY_SECONDS)
    start = time.time()
    engine.run(arrivals.requests(engine, work))
    spans.put((start, time.time()))
