"""How many images to encode between two decode steps, and when: measured by what clients feel.

Encoding several images in one go may be faster for each, but every running caption waits for it,
and so do the images in it for each other. The defaults of `encode_batch` and `patience`
(`runtime.pacing`) are chosen by this table.
"""

import itertools
import random
import time
from typing import Any

from tqdm import tqdm

from bench.ablation import open_loop
from bench.arithmetic import percentile
from bench.isolated import isolated
from bench.offline import pictures
from bench.settings import Settings
from runtime.config import EngineConfig
from runtime.engine import Engine

_POLICIES = ((1, 0.0), (1, 0.5), (1, 1.0), (2, 0.5), (4, 0.5))  # encode batch, patience
_CLIENTS = (1, 4, 16, 64)
_LOADS = (0.5, 0.8)  # of the rate that the first policy reaches with most clients
_LENGTHS = (8, 24)  # shortest and longest caption, in tokens


def measure(settings: Settings) -> dict[str, Any]:
    """Rate, mean and p99 latency of every policy, in a closed loop and with Poisson arrivals."""
    policies = _POLICIES[: settings.policies]
    clients = _CLIENTS[:: 1 if settings.policies == len(_POLICIES) else 2]
    rows: list[dict[str, Any]] = []
    total = len(policies) * (len(clients) + len(_LOADS))
    with tqdm(total=total, desc="scheduling", unit="case") as progress:
        for policy, count in itertools.product(policies, clients):
            rows.append(isolated(_closed_loop, *policy, count, settings))
            progress.update()
        capacity = max(row["rate"] for row in rows)
        for policy, load in itertools.product(policies, _LOADS):
            rows.append(isolated(_poisson, *policy, load, capacity, settings))
            progress.update()
    return {"rows": rows}


def _row(batch: int, patience: float, load: str, waits: list[float], rate: float) -> dict[str, Any]:
    return {
        "encode_batch": batch,
        "patience": patience,
        "load": load,
        "rate": rate,
        "mean_ms": sum(waits) / len(waits) * 1e3,
        "p99_ms": percentile(waits, 0.99) * 1e3,
    }


def _poisson(
    batch: int, patience: float, load: float, capacity: float, settings: Settings
) -> dict[str, Any]:
    """Requests that come at a share of the capacity, whatever happens to those before them."""
    engine = Engine.open(settings.engine, EngineConfig(encode_batch=batch, patience=patience))
    images = pictures(16, engine.runner.pixels_shape)
    rng = random.Random(0)
    due = itertools.accumulate(rng.expovariate(load * capacity) for _ in range(2 * settings.images))
    arrivals = [(at, rng.choice(images), rng.randint(*_LENGTHS)) for at in due]
    start = time.perf_counter()
    waits = open_loop(engine, arrivals)
    rate = len(waits) / (time.perf_counter() - start)
    return _row(batch, patience, f"Poisson, {load:.0%} load", waits, rate)


def _closed_loop(batch: int, patience: float, clients: int, settings: Settings) -> dict[str, Any]:
    """Each client asks again as soon as it is answered."""
    engine = Engine.open(settings.engine, EngineConfig(encode_batch=batch, patience=patience))
    images = pictures(16, engine.runner.pixels_shape)
    rng = random.Random(0)
    left = max(settings.images, 2 * clients)
    total, waits = left, []
    start = time.perf_counter()
    for _ in range(clients):
        engine.submit(rng.choice(images), None, rng.randint(*_LENGTHS), ignore_eos=True)
        left -= 1
    while not engine.scheduler.idle:
        for done in engine.step():
            waits.append((done.finished_at or 0) - done.submitted_at)
            if left:
                engine.submit(rng.choice(images), None, rng.randint(*_LENGTHS), ignore_eos=True)
                left -= 1
    rate = total / (time.perf_counter() - start)
    return _row(batch, patience, f"{clients} clients", waits, rate)
