"""How many images to encode between two decode steps, and when: compared by clients' latency.

A larger encoder batch may be faster per image, but all running sequences wait for it, and its
images wait for each other. This table decides the defaults of `encode_batch` and `patience`
(`runtime.pacing`). The costs of both graphs are measured here and replayed through the engine's
loop (`bench.load.replay`); the replay is checked against the engine itself.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.common.arithmetic import percentile
from bench.common.isolated import isolated
from bench.common.settings import Settings
from bench.common.timing import pictures
from bench.load import arrivals
from bench.load.costs import Costs, measure_alone
from bench.load.replay import Clock, replayed
from runtime.engine import Engine
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig

Load = Callable[[Engine, Clock], list[float]]

_TURNS = 4  # times `settings.repeats`; the fastest counts
Policy = tuple[int, float]  # encode batch, patience

_DEFAULT = EngineConfig().patience
_LENGTHS = (8, 24)  # shortest and longest caption, in tokens
_CLIENTS = (1, 4, 16, 64)
_LOADS = (0.5, 0.8, 0.95)  # shares of the slowest policy's capacity
_CHECKED = 16  # clients in the check of the replay


def measure(settings: Settings) -> dict[str, Any]:
    """Throughput, mean and p99 latency of every policy: closed loops and Poisson arrivals."""
    with tqdm(total=2, desc="scheduling", unit="part") as progress:
        costs, runs_on = isolated(measure_alone, settings.engine, _TURNS * settings.repeats)
        measured = isolated(_rate, settings)
        progress.update()
        rows = _rows(settings, costs)
        progress.update()
    jobs = _jobs(settings, settings.images)
    check = partial(_closed, work=jobs, clients=_CHECKED)
    return {
        "runs_on": runs_on,
        "encode_ms": [1e3 * s for s in costs.encode_s],
        "decode_ms": [1e3 * s for s in costs.decode_s],
        "check": {
            "clients": _CHECKED,
            "measured": measured,
            "replayed": _replayed(settings, costs, (len(costs.encode_s), _DEFAULT), check)["rate"],
        },
        "rows": rows,
    }


def _policies(most: int) -> list[Policy]:
    """Policies around the default. most: images of the default's encoder calls."""
    pairs = [(1, _DEFAULT), (most // 2, _DEFAULT), (most, 0.0), (most, _DEFAULT),
             (most, 4 * _DEFAULT)]  # fmt: skip
    return [policy for policy in dict.fromkeys(pairs) if policy[0]]


def _rows(settings: Settings, costs: Costs) -> list[dict[str, Any]]:
    work, policies = _jobs(settings, settings.replayed), _policies(len(costs.encode_s))
    loads: dict[str, Load] = {
        f"{count} clients": partial(_closed, work=work, clients=count) for count in _CLIENTS
    }
    everything = partial(_closed, work=work, clients=len(work))
    capacity = min(_replayed(settings, costs, p, everything)["rate"] for p in policies)
    for share in _LOADS:
        loads[f"Poisson, {share:.0%} load"] = partial(_open, work=work, rate=share * capacity)
    return [
        {"load": name, "encode_batch": policy[0], "patience": policy[1]}
        | _replayed(settings, costs, policy, load)
        for name, load in loads.items()
        for policy in policies
    ]


def _jobs(settings: Settings, count: int) -> list[arrivals.Job]:
    shape = manifests.read(settings.engine).sizes.pixels
    return arrivals.jobs([np.zeros(shape, np.uint8)], count, *_LENGTHS)


def _closed(engine: Engine, _: Clock, work: list[arrivals.Job], clients: int) -> list[float]:
    return arrivals.closed_loop(engine, work, clients)


def _open(engine: Engine, clock: Clock, work: list[arrivals.Job], rate: float) -> list[float]:
    return arrivals.poisson(engine, work, rate, clock, clock.pass_by)


def _replayed(settings: Settings, costs: Costs, policy: Policy, load: Load) -> dict[str, float]:
    config = EngineConfig(encode_batch=policy[0], patience=policy[1])
    manifest = manifests.read(settings.engine)
    engine, clock = replayed(settings.engine, manifest, costs, config)
    waits = load(engine, clock)
    return {
        "rate": len(waits) / clock.now,
        "mean_ms": sum(waits) / len(waits) * 1e3,
        "p99_ms": percentile(waits, 0.99) * 1e3,
    }


def _rate(settings: Settings) -> float:
    """Captions per second of the engine itself, in the closed loop that the check replays."""
    engine = Engine.open(settings.engine)
    images = pictures(16, engine.manifest.sizes.pixels)
    work = arrivals.jobs(images, settings.images, *_LENGTHS)
    arrivals.closed_loop(engine, work[:_CHECKED], _CHECKED)
    rates = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        arrivals.closed_loop(engine, work, _CHECKED)
        rates.append(len(work) / (time.perf_counter() - start))
    return statistics.median(rates)
