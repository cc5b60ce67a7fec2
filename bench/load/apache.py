"""ApacheBench: closed-loop load, in which each client sends its next request when the last one is
answered.
"""

import csv
import re
import subprocess
from pathlib import Path
from typing import Any

from bench.common.arithmetic import percentile, rate
from bench.contestants.servers import Contestant, ServerFailed

AB_MISSING = "ab is missing: apt-get install apache2-utils (httpd-tools on Fedora)"


def run(
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
