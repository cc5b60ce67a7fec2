"""Throughput, latency and price of many hosts, simulated.

Service times are measured here and fed to a simulation (`bench.scaling`). Before it predicts many
hosts, it has to reproduce this one as measured over HTTP.
"""

import asyncio
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from tqdm import tqdm

from bench.common.arithmetic import percentile
from bench.common.isolated import isolated
from bench.common.machine import about
from bench.common.processes import family, runs_engine, server_on, worked
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s
from bench.contestants.servers import picture, running, vignette
from bench.load.arrivals import coco_jobs
from bench.load.closed_loop import caption, rate
from bench.load.costs import Costs, measure_in_use
from bench.scaling.hosts import Cluster, Kind
from bench.sections.images import jpeg
from runtime.model import manifest as manifests
from runtime.model.preprocess import preprocess
from runtime.planning.machine import this_machine

_CLIENTS = 1, 4, 16, 64  # over HTTP, measured and simulated
_WITHIN = 0.1
_CPU_HOSTS = 1, 4, 16, 64, 256
_GPU_HOSTS = 1, 4, 16, 64
_LOAD = 0.8  # offered load for p99, as a share of the cluster's capacity
_EACH_CPU, _EACH_GPU = 100, 1000  # simulated requests per host
_DAY = 86_400
_WANTED = 1e6, 1e9  # captions a day
_LARGE = 4000, 3000  # pixels of a phone's photograph
# Assumed prices of renting such a host for an hour; not looked up.
_CPU_DOLLARS, _GPU_DOLLARS = 0.10, 4.00
# Targets, set before a GPU was measured: 0.15 ms of the encoder for an image, 0.5 ms for a step of
# 64 rows. With nothing else to wait for that would be 4,000 captions a second. One H200 has met
# them since (bench/results/h200): 0.15 ms, and 0.67 ms for a step of 256 rows.
_GPU_CORES, _GPU_ENCODE_S, _GPU_STEP_S, _GPU_SLOTS = 16, 0.15e-3, 0.5e-3, 64


def measure(settings: Settings) -> dict[str, Any]:
    """Check the simulation against this machine; then simulate clusters of CPU and GPU hosts."""
    here = _measured(settings)
    costs = Costs.median(turn.costs for turn in here.turns)
    how = manifests.read(settings.engine).preprocessing
    with tempfile.TemporaryDirectory() as folder:
        small, large = picture(Path(folder)), jpeg(*_LARGE)
    decode_s, large_s = (median_s(lambda: preprocess(i, how), 9) for i in (small, large))  # noqa: B023
    cores = this_machine().cores
    host = Kind(
        f"{cores} cores, as measured", cores, costs, here.front_s - decode_s, decode_s, True,
        _CPU_DOLLARS, image_bytes=len(small),
    )  # fmt: skip
    found = {
        "runs_on": here.runs_on,
        "machine": about()["machine"],
        "costs_ms": {
            "encoder, an image": 1e3 * costs.encode_s[-1] / len(costs.encode_s),
            f"decode step of {len(costs.decode_s)} rows": 1e3 * costs.decode_s[-1],
            "JPEG decoding, 640 x 480": 1e3 * decode_s,
            f"JPEG decoding, {_LARGE[0]} x {_LARGE[1]}": 1e3 * large_s,
            "front-end, of a core": 1e3 * host.front_s,
        },
        "check": _check(here, host, settings),
    }
    worst = max(abs(row[off]) for row in found["check"] for off in ("rate_off", "median_off"))
    if worst > _WITHIN:
        return found | {"failed": f"the simulation is off by {worst:.0%}: nothing further is said"}
    gpu = Kind(
        f"a GPU (target, not measured) and {_GPU_CORES} cores as these", _GPU_CORES, _gpu_costs(),
        host.front_s, decode_s, False, _GPU_DOLLARS, image_bytes=len(small),
    )  # fmt: skip
    photos = replace(
        gpu, name=f"{gpu.name}, photographs of {_LARGE[0]} x {_LARGE[1]}", decode_s=large_s,
        image_bytes=len(large),
    )  # fmt: skip
    rows = []
    plan = [(host, n, _EACH_CPU) for n in _CPU_HOSTS]
    plan += [(kind, n, _EACH_GPU) for kind in (gpu, photos) for n in _GPU_HOSTS]
    for kind, count, each in tqdm(plan, desc="scaling", unit="cluster"):
        if count <= settings.most_hosts:
            rows.append(_row(kind, count, each, settings))
    return found | {"rows": rows, "needed": list(_needed(rows))}


def _gpu_costs() -> Costs:
    """Costs of a GPU that meets the targets above."""
    encode = [0.3e-3 + _GPU_ENCODE_S * n for n in range(1, 33)]
    decode = [_GPU_STEP_S * (0.6 + 0.4 * n / _GPU_SLOTS) for n in range(1, _GPU_SLOTS + 1)]
    return Costs(encode, decode)


@dataclass(frozen=True, slots=True)
class _Loop:
    """Result of a closed loop: captions per second, and median latency in seconds."""

    rate: float
    median_s: float


@dataclass(frozen=True, slots=True)
class _Turn:
    """Costs of the engine in use, and closed loops over HTTP by number of clients."""

    costs: Costs
    loops: dict[int, _Loop]


@dataclass(frozen=True, slots=True)
class _Here:
    """This machine. front_s, client_s: core seconds per request in the service outside the engine,
    and in the client.
    """

    turns: list[_Turn]
    runs_on: str
    front_s: float
    client_s: float


def _measured(settings: Settings) -> _Here:
    """Measure the engine in use and the service over HTTP, in turns: a slow moment slows both."""
    turns, count, client_s = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        image = picture(Path(folder))
        with running(vignette(settings), image) as url:
            asyncio.run(_loop(url, image, 16, settings))  # to warm up
            port = urlsplit(url).port
            assert port is not None
            others = [pid for pid in family(server_on(port)) if not runs_engine(pid)]
            before = sum(map(worked, others))
            for _ in range(2 * settings.repeats + 1):
                costs, runs_on = isolated(measure_in_use, settings.engine)
                began = time.process_time()
                loops = {n: asyncio.run(_loop(url, image, n, settings)) for n in _CLIENTS}
                client_s += time.process_time() - began
                count += sum(_requests(n, settings) for n in _CLIENTS)
                turns.append(_Turn(costs, loops))
            front_s = (sum(map(worked, others)) - before) / count
    return _Here(turns, runs_on, front_s, client_s / count)


def _requests(clients: int, settings: Settings) -> int:
    """Requests of a closed loop, measured and simulated alike."""
    return max(3 * clients, settings.images // (4 if clients < 4 else 1))


async def _loop(url: str, image: bytes, clients: int, settings: Settings) -> _Loop:
    waits: list[float] = []
    async with aiohttp.ClientSession() as http:

        async def ask() -> None:
            began = time.perf_counter()
            await caption(http, url, image)
            waits.append(time.perf_counter() - began)

        return _Loop(await rate(ask, _requests(clients, settings), clients), median(waits))


def _check(here: _Here, host: Kind, settings: Settings) -> list[dict[str, float]]:
    """Each turn's loops, simulated with its costs; the clients use this machine's cores, too.
    `*_off`: simulated over measured, less one, in the median of the turns.
    """
    rows = []
    for clients in here.turns[0].loops:
        measured, simulated = [], []
        for turn in here.turns:
            both = replace(host, engine=turn.costs, front_s=host.front_s + here.client_s)
            cluster = Cluster(both, 1, settings.engine)
            cluster.closed_loop(clients, [TOKENS] * _requests(clients, settings))
            simulated.append(_Loop(cluster.rate, median(cluster.seconds)))
            measured.append(turn.loops[clients])
        pairs = list(zip(simulated, measured, strict=True))
        rows.append(
            {
                "clients": clients,
                "measured": median(loop.rate for loop in measured),
                "rate": median(loop.rate for loop in simulated),
                "rate_off": median(s.rate / m.rate for s, m in pairs) - 1,
                "measured_median_s": median(loop.median_s for loop in measured),
                "median_s": median(loop.median_s for loop in simulated),
                "median_off": median(s.median_s / m.median_s for s, m in pairs) - 1,
            }
        )
    return rows


def _row(kind: Kind, count: int, each: int, settings: Settings) -> dict[str, Any]:
    """A cluster of `count` hosts at capacity, and at 80 % of it. each: requests per host."""
    lengths = [tokens for _, tokens in coco_jobs([np.zeros(0)], each * count)]
    full = Cluster(kind, count, settings.engine)
    full.closed_loop(3 * kind.slots * count, lengths)
    used = full.used()
    usual = Cluster(kind, count, settings.engine)
    usual.poisson(_LOAD * full.rate, lengths)
    return {
        "kind": kind.name,
        "hosts": count,
        "dollars": kind.dollars,
        "rate": full.rate,
        "p99_s": percentile(usual.seconds, 0.99),
        "dollars_per_million": 1e6 * kind.dollars * count / 3600 / full.rate,
        "bound": _bound(used),
        "used": used,
        "image_bits": full.rate * kind.image_bytes * 8,
    }


def _bound(used: dict[str, float]) -> str:
    """The busiest part and its utilisation; JPEG decoding and front-ends share the cores."""
    decoding, front = used["JPEG decoding"], used["front-ends"]
    cores = f"cores (JPEG decoding {decoding:.0%}, front-ends {front:.0%})"
    shares = {"engine": used["engine"], cores: decoding + front, "network": used["network"]}
    bound = max(shares, key=lambda part: shares[part])
    return f"{bound}, {shares[bound]:.0%}"


def _needed(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Hosts of each kind for `_WANTED` captions a day, at 80 % of capacity."""
    kinds: dict[str, dict[str, Any]] = {}
    for row in rows:
        kinds[row["kind"]] = row  # the last row has the most hosts
    for wanted in _WANTED:
        for name, row in kinds.items():
            hosts = math.ceil(wanted / _DAY / (_LOAD * row["rate"] / row["hosts"]))
            yield {
                "a_day": wanted,
                "kind": name,
                "hosts": hosts,
                "dollars_a_day": 24 * hosts * row["dollars"],
                "gigabits": wanted / _DAY * row["image_bits"] / row["rate"] / 1e9,
            }
