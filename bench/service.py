"""The service as a process: how soon it is ready, what it holds in memory, what HTTP costs."""

import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.apache import all_answered
from bench.contestants import ask, free_port, in_process, picture, running, vignette
from bench.processes import family, pss
from bench.settings import Settings

_REQUESTS = 20


def measure(settings: Settings, sections: dict[str, Any]) -> dict[str, Any]:
    """sections: `offline` and `http`, if measured, for the share of the engine's own rate."""
    found: dict[str, Any] = {}
    with tqdm(total=4, desc="service", unit="part") as progress:
        found["start_s"] = [_ready_after(settings) for _ in range(2)]
        progress.update(2)
        found |= _cost_of_http(settings)
        progress.update()
        found |= _cost_of_the_split(settings)
        progress.update()
    return found | _share_of_the_engine(sections)


def _ready_after(settings: Settings) -> float:
    """Seconds from the command to the answer of /health/ready."""
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
    """One client: what is left of its time without encode and decode; memory after a burst."""
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
            _ab(url, Path(name))
            return {"http_cost_ms": statistics.median(costs), "resident_mib": _resident_mib(url)}


def _ab(url: str, folder: Path, requests: int = 64) -> float:
    """Requests a second of 16 clients, every slot used."""
    command = ["ab", "-q", "-l", "-n", str(requests), "-c", "16", "-p", str(folder / "picture.jpg"),
               "-T", "image/jpeg", url]  # fmt: skip
    return all_answered(command)


def _cost_of_the_split(settings: Settings) -> dict[str, float]:
    """16 clients on the service and on its engine in one process, both running, taking turns."""
    rates: dict[str, list[float]] = {"split": [], "one": []}
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        ours, single = vignette(settings), in_process(settings)
        with running(ours, image) as split, running(single, image) as one:
            for _ in range(settings.repeats + 2):
                for which, url in (("split", split), ("one", one)):
                    rates[which].append(_ab(url, Path(name), 2 * settings.images))
    medians = {which: statistics.median(some) for which, some in rates.items()}
    return {"share_of_one_process": medians["split"] / medians["one"]}


def _resident_mib(url: str) -> float:
    """Memory of the server that listens at `url` and all its processes, pages shared between them
    counted once (PSS), as Linux counts it."""
    port = re.search(r":(\d+)/", url)
    assert port is not None
    wanted = port.group(1).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"server" in command and wanted in command:
            return sum(map(pss, family(int(process.name)))) / 2**20
    raise RuntimeError("the server's process was not found")


def _share_of_the_engine(sections: dict[str, Any]) -> dict[str, Any]:
    """HTTP's captions a second at 16 clients over the engine's own, both of this run."""
    runs = sections.get("http", {}).get("runs", [])
    ours = [r for r in runs if r["contestant"] == "Vignette" and r.get("clients") == 16]
    engines = sections.get("offline", {}).get("vignette", [])
    if not ours or not engines:
        return {"share_of_engine": None}
    longest = max(ours, key=lambda r: r["requests"])
    best = min(e["ms_per_image"] for e in engines)
    return {"share_of_engine": longest["rate"] * best / 1e3}
