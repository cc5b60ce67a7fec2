"""Contestants over HTTP under closed-loop load, as in the original challenge.

Every run is finished: a contestant's number of requests follows from its latency, so that slow ones
fit too. Runs that would take too long are left out and reported so.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common.arithmetic import affordable
from bench.common.settings import Settings
from bench.contestants.servers import (
    Contestant,
    ServerFailed,
    ask,
    baselines,
    picture,
    running,
    vignette,
)
from bench.load import apache

_SOLO = 3  # requests timed to estimate the latency of one


def measure(settings: Settings, only_baselines: bool = False) -> dict[str, Any]:
    """Run all contestants at every number of clients and requests."""
    contestants = baselines(settings) + ([] if only_baselines else [vignette(settings)])
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = picture(folder)
        total = len(contestants) * len(_loads(settings))
        with tqdm(total=total, desc="ApacheBench", unit="run") as progress:
            for contestant in contestants:
                runs += _contestant(contestant, settings, folder, image, progress)
    return {"runs": runs}


def _loads(settings: Settings) -> list[tuple[int, int]]:
    """(clients, requests); ab can't have more clients than requests."""
    return [(c, n) for c in settings.clients for n in settings.requests if c <= n]


def _contestant(
    contestant: Contestant, settings: Settings, folder: Path, image: bytes, progress: tqdm
) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = []
    try:
        with running(contestant, image) as url:
            solo = _solo(contestant, url, image)
            for clients, requests in _loads(settings):
                progress.set_postfix_str(f"{contestant.name}, {clients} clients")
                run: dict[str, Any] = {"contestant": contestant.name, "clients": clients}
                count = affordable(requests, clients, solo, settings.budget)
                progress.update()
                if any(
                    (r["clients"], r["requests"]) in ((clients, count), (clients, 0)) for r in runs
                ):
                    continue  # the budget leaves no more requests than in the run before
                run["requests"] = count
                if count:
                    run |= apache.run(contestant, url, clients, count, folder, image)
                else:
                    run["note"] = f"left out: {clients} requests take {clients * solo:.0f} s"
                runs.append(run)
    except ServerFailed as failure:
        tqdm.write(str(failure))
        runs.append({"contestant": contestant.name, "failed": str(failure)})
    return runs


def _solo(contestant: Contestant, url: str, image: bytes) -> float:
    """Median latency in seconds of a request sent alone."""
    times = []
    for _ in range(_SOLO):
        start = time.perf_counter()
        ask(contestant, url, image)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
