"""Closed-loop load with ApacheBench, as in the original challenge: each client sends its next
request when the last one is answered.

Every run is finished: a contestant's number of requests follows from its latency, so that slow ones
fit too. Runs that would take too long are left out and reported so.
"""

import csv
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common.arithmetic import affordable, percentile, rate
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

AB_MISSING = "ab is missing: apt-get install apache2-utils (httpd-tools on Fedora)"
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
                    run |= _ab(contestant, url, clients, count, folder, image)
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


def _ab(
    contestant: Contestant, url: str, clients: int, requests: int, folder: Path, image: bytes
) -> dict[str, Any]:
    """One run of ab: counts, and the time of each request in milliseconds, sorted."""
    body, content_type = contestant.body(image)
    (folder / "body").write_bytes(body)
    table = folder / "times.tsv"
    table.unlink(missing_ok=True)
    said = _run(url, folder / "body", content_type, requests, clients, "-g", str(table))
    times = _times(table)
    return summary(said, times) | {"times_ms": times}


def _run(url: str, body: Path, content_type: str, requests: int, clients: int, *more: str) -> str:
    """Run ab; returns its output. Raises ServerFailed."""
    # -l: captions have different lengths. -s: seconds to wait for an answer.
    command = ["ab", "-q", "-l", "-s", "600", "-n", str(requests), "-c", str(clients),
               "-p", str(body), "-T", content_type, *more, url]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerFailed(f"ab failed on {url}: {done.stderr.strip()[-300:]}")
    return done.stdout


def all_answered(url: str, image: Path, requests: int, clients: int) -> float:
    """Throughput of a run of ab in captions per second. Raises ServerFailed if a request failed.

    image: a JPEG.
    """
    found = counts(_run(url, image, "image/jpeg", requests, clients))
    if found["errors"]:
        raise ServerFailed(f"{found['errors']} of {found['answered']} requests got no caption")
    return found["rate"]


def summary(output: str, times: list[float]) -> dict[str, Any]:
    """Counts from ab's output; mean, p50 and p99 of `times` in milliseconds."""
    return counts(output) | {
        "mean_ms": sum(times) / len(times),
        "p50_ms": percentile(times, 0.5),
        "p99_ms": percentile(times, 0.99),
    }


def counts(output: str) -> dict[str, float]:
    """Answers, errors among them, seconds, and `rate`: captions per second, errors excluded."""
    seconds = _number(r"Time taken for tests:\s+([\d.]+)", output)
    answered = int(_number(r"Complete requests:\s+(\d+)", output))
    failed = int(_number(r"Failed requests:\s+(\d+)", output))
    refused = int(_number(r"Non-2xx responses:\s+(\d+)", output, default=0))
    return {
        "answered": answered,
        "errors": failed + refused,
        "seconds": seconds,
        "rate": rate(answered - failed - refused, seconds),
    }


def _number(pattern: str, output: str, default: float | None = None) -> float:
    match = re.search(pattern, output)
    if match is None:
        if default is None:
            raise ServerFailed(f"ab's output lacks {pattern!r}: {output[-300:]}")
        return default
    return float(match.group(1))


def _times(table: Path) -> list[float]:
    """Total time of each request in milliseconds, from ab's gnuplot table, ascending."""
    with table.open() as file:
        return sorted(float(row["ttime"]) for row in csv.DictReader(file, delimiter="\t"))
