"""How many images to encode between two decode steps, and when: measured by what clients feel.

Encoding several images in one go may be faster for each, but every running caption waits for it,
and so do the images in it for each other. The defaults of `encode_batch` and `patience`
(`runtime.pacing`) are chosen by this table.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from bench import arrivals
from bench.arithmetic import percentile
from bench.isolated import isolated
from bench.offline import pictures
from bench.settings import Settings
from runtime.config import EngineConfig
from runtime.engine import Engine

Load = Callable[[Engine], list[float]]

_POLICIES = ((1, 0.0), (1, 0.5), (4, 0.5))  # encode batch, patience
_LENGTHS = (8, 24)  # shortest and longest caption, in tokens
_REPEATS = 2  # of each case; the policies take turns


def measure(settings: Settings) -> dict[str, Any]:
    """Rate, mean and p99 latency of every policy, in a closed loop and with Poisson arrivals."""
    return {"rows": isolated(_all, settings)}


def _all(settings: Settings) -> list[dict[str, Any]]:
    """All policies take turns in one process, so that a slow minute is slow for each of them."""
    engines = {
        (batch, patience): Engine.open(
            settings.engine, EngineConfig(encode_batch=batch, patience=patience)
        )
        for batch, patience in _POLICIES[: settings.policies]
    }
    images = pictures(16, next(iter(engines.values())).runner.pixels_shape)
    loads: dict[str, Load] = {}
    for count in settings.scheduling_clients:
        work = arrivals.jobs(images, max(settings.images // 2, 2 * count), *_LENGTHS)
        loads[f"{count} clients"] = partial(arrivals.closed_loop, work=work, clients=count)
    work = arrivals.jobs(images, settings.images, *_LENGTHS)
    capacity = _capacity(engines, work)
    for share in settings.loads:
        rate = share * capacity
        loads[f"Poisson, {share:.0%} load"] = partial(arrivals.poisson, work=work, rate=rate)
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(loads) * _REPEATS, desc="scheduling", unit="turn") as progress:
        for name, load in loads.items():
            found: dict[tuple[int, float], list[dict[str, float]]] = {p: [] for p in engines}
            for _ in range(_REPEATS):
                for policy, engine in engines.items():
                    found[policy].append(_measured(engine, load))
                progress.update()
            rows += [_row(name, policy, runs) for policy, runs in found.items()]
    return rows


def _capacity(engines: dict[Any, Engine], work: list[arrivals.Job]) -> float:
    """Captions a second of the slowest policy when all work is there at once."""
    rates = []
    for engine in engines.values():
        start = time.perf_counter()
        arrivals.closed_loop(engine, work, len(work))
        rates.append(len(work) / (time.perf_counter() - start))
    return min(rates)


def _measured(engine: Engine, load: Load) -> dict[str, float]:
    start = time.perf_counter()
    waits = load(engine)
    return {
        "rate": len(waits) / (time.perf_counter() - start),
        "mean_ms": sum(waits) / len(waits) * 1e3,
        "p99_ms": percentile(waits, 0.99) * 1e3,
    }


def _row(load: str, policy: tuple[int, float], runs: list[dict[str, float]]) -> dict[str, Any]:
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {"load": load, "encode_batch": policy[0], "patience": policy[1]} | medians
