"""The service as a process: its start-up time, its memory, and what HTTP costs."""

import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from bench.common.isolated import isolated
from bench.common.processes import family, pss, server_on
from bench.common.settings import TOKENS, Settings
from bench.common.timing import pictures, seconds
from bench.contestants.servers import (
    PICTURE,
    ask,
    free_port,
    in_process,
    picture,
    running,
    vignette,
)
from bench.load.apache import all_answered
from runtime.engine import Engine

_REQUESTS = 20
_CLIENTS = 16  # of ab: all slots in use


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds until ready, milliseconds of HTTP, mebibytes, shares of throughput."""
    found: dict[str, Any] = {}
    with tqdm(total=4, desc="service", unit="part") as progress:
        found["start_s"] = [_ready_after(settings) for _ in range(2)]
        progress.update(2)
        found |= _cost_of_http(settings)
        progress.update()
        found |= isolated(_shares, settings)
        progress.update()
    return found


def _ready_after(settings: Settings) -> float:
    """Seconds from the command until /health/ready answers 200."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "server",
        "--engine",
        str(settings.engine),
        "--port",
        str(port),
    ]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready").close()
                    return time.perf_counter() - start
                except OSError:
                    if server.poll() is not None:
                        raise RuntimeError("the server ended while it started") from None
                    time.sleep(0.02)
        finally:
            server.terminate()


def _cost_of_http(settings: Settings) -> dict[str, Any]:
    """One client's latency less encode and decode; memory after a burst."""
    ours = vignette(settings)
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        with running(ours, image) as url:
            costs = []
            for _ in range(_REQUESTS):
                start = time.perf_counter()
                timing = ask(ours, url, image)["timing_ms"]
                whole = (time.perf_counter() - start) * 1e3
                costs.append(whole - timing["encode"] - timing["decode"])
            all_answered(url, Path(name, PICTURE), 64, _CLIENTS)
            return {"http_cost_ms": statistics.median(costs), "resident_mib": _resident_mib(url)}


def _shares(settings: Settings) -> dict[str, float]:
    """The service's throughput with 16 clients, relative to the engine alone and to one process.

    All three stand ready and take turns: a slow minute of the machine is slow for all.
    """
    engine = Engine.open(settings.engine)
    images = pictures(settings.images, engine.manifest.sizes.pixels)
    alone = partial(engine.generate, images, max_new_tokens=TOKENS, ignore_eos=True)
    rates: dict[str, list[float]] = {"service": [], "process": [], "engine": []}
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        with (
            running(vignette(settings), image) as ours,
            running(in_process(settings), image) as one,
        ):
            for _ in range(settings.repeats + 2):
                rates["engine"].append(len(images) / seconds(alone))
                for which, url in (("service", ours), ("process", one)):
                    rates[which].append(
                        all_answered(url, Path(name, PICTURE), 2 * settings.images, _CLIENTS)
                    )
    medians = {which: statistics.median(some) for which, some in rates.items()}
    return {
        "share_of_engine": medians["service"] / medians["engine"],
        "share_of_one_process": medians["service"] / medians["process"],
    }


def _resident_mib(url: str) -> float:
    """PSS in MiB of the server at `url` and its descendants: shared pages count once."""
    port = urlsplit(url).port
    assert port is not None
    return sum(map(pss, family(server_on(port)))) / 2**20
