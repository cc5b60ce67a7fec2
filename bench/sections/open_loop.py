"""Open-loop load with MLPerf's LoadGen: requests arrive whether earlier ones are answered or not.

LoadGen draws Poisson arrivals, counts each latency from the time a request was due, and says
whether p99 stayed under the bound. Here it drives a server over HTTP. An error or a time-out counts
as a miss: it is reported as complete only after the bound.
"""

import array
import asyncio
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import mlperf_loadgen as lg
from tornado.httpclient import AsyncHTTPClient
from tornado.simple_httpclient import SimpleAsyncHTTPClient
from tqdm import tqdm

from bench.common.arithmetic import highest
from bench.common.isolated import Failed, isolated
from bench.common.settings import Settings
from bench.contestants.servers import (
    Contestant,
    ServerFailed,
    baselines,
    picture,
    running,
    vignette,
)

_BOUNDS = (0.5, 5.0)  # seconds for p99; PyTorch is tried at the last only, where it has a chance
_SAMPLES = 16
_ENOUGH = 460  # queries after which LoadGen calls a p99 valid (its early-stopping rule)
_KEEPS_UP = 0.95  # share of the offered load: the last answers come after the last request
_LONGEST_TEST = 60  # seconds to which a test may be extended for a valid p99
_GIVE_UP = 90  # seconds; request time-out


class _Client:
    """Sends LoadGen's queries from an event loop of its own."""

    def __init__(self, contestant: Contestant, url: str, image: bytes, bound: float) -> None:
        self._body, self._type = contestant.body(image)
        self._url, self._late = url, 1.1 * bound
        self.errors = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._http: AsyncHTTPClient
        asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()

    async def _connect(self) -> None:
        self._http = SimpleAsyncHTTPClient(force_instance=True, max_clients=2048)

    def issue(self, queries: list[Any]) -> None:
        """LoadGen's callback; must not block."""
        due = time.perf_counter()
        for query in queries:
            asyncio.run_coroutine_threadsafe(self._send(query.id, due), self._loop)

    async def _send(self, query: int, due: float) -> None:
        try:
            await self._http.fetch(
                self._url, method="POST", body=self._body, headers={"Content-Type": self._type},
                request_timeout=_GIVE_UP, connect_timeout=_GIVE_UP,
            )  # fmt: skip
        except Exception:  # any exception: the caption is missing
            self.errors += 1
            await asyncio.sleep(max(0.0, due + self._late - time.perf_counter()))
        response = array.array("B", b"\0")
        address, _ = response.buffer_info()
        lg.QuerySamplesComplete([lg.QuerySampleResponse(query, address, 1)])

    def close(self) -> None:
        """Stop the event loop."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def run(
    contestant: Contestant,
    url: str,
    image: bytes,
    rate: float,
    bound: float | None,
    queries: int,
) -> dict[str, Any]:
    """One LoadGen test: Server scenario at `rate` requests per second; Offline without a bound."""
    client = _Client(contestant, url, image, bound or 0.0)
    settings = lg.TestSettings()
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = queries
    settings.min_duration_ms = 0
    if bound is None:
        settings.scenario = lg.TestScenario.Offline
        settings.offline_expected_qps = rate
        settings.min_query_count = 1
        settings.min_duration_ms = round(queries / rate * 1000)
    else:
        settings.scenario = lg.TestScenario.Server
        settings.server_target_qps = rate
        settings.server_target_latency_ns = int(bound * 1e9)
        settings.server_target_latency_percentile = 0.99
    with tempfile.TemporaryDirectory() as folder:
        log = lg.LogSettings()
        log.log_output.outdir = folder
        log.log_output.copy_summary_to_stdout = False
        log.enable_trace = False
        sut = lg.ConstructSUT(client.issue, lambda: None)
        qsl = lg.ConstructQSL(_SAMPLES, _SAMPLES, lambda _: None, lambda _: None)
        lg.StartTestWithLogSettings(sut, qsl, settings, log)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
    client.close()
    return parsed(summary) | {"rate": rate, "errors": client.errors}


def parsed(summary: str) -> dict[str, Any]:
    """Numbers from LoadGen's summary; latencies in milliseconds."""

    def number(name: str) -> float | None:
        match = re.search(rf"^{re.escape(name)}\s*:\s*([\d.e+]+)", summary, re.MULTILINE)
        return float(match.group(1)) if match else None

    p99 = number("99.00 percentile latency (ns)")
    return {
        "valid": "Result is : VALID" in summary,  # requires enough queries, too
        "in_bound": "Performance constraints satisfied : Yes" in summary,
        "per_second": number("Completed samples per second") or number("Samples per second"),
        "p99_ms": None if p99 is None else p99 / 1e6,
    }


def held(found: dict[str, Any]) -> bool:
    """Whether p99 stayed under the bound, every request got its caption, and no backlog grew.

    A test is short: an unsustainable rate shows as throughput below the offered load.
    """
    keeps_up = (found["per_second"] or 0.0) >= _KEEPS_UP * found["rate"]
    return found["in_bound"] and not found["errors"] and keeps_up


def measure(settings: Settings, known_rates: dict[str, float]) -> dict[str, Any]:
    """The highest Poisson rate within each bound for Vignette, within the last for a baseline.

    known_rates: closed-loop captions per second by contestant, to start the search from.
    """
    rivals = [c for c in baselines(settings) if c.name in known_rates]
    # LoadGen's bursts must fit the queue: refusals are not measured here.
    ours = vignette(settings, "--max-queue", "4096")
    contestants: list[tuple[Contestant, tuple[float, ...]]] = [(ours, _BOUNDS)]
    if rivals and settings.rates > 1:
        best = max(rivals, key=lambda c: known_rates[c.name])
        contestants.append((best, _BOUNDS[-1:]))
    found: dict[str, Any] = {"server": [], "offline": []}
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        for contestant, bounds in contestants:
            start_rate = known_rates.get(contestant.name, 10.0)
            try:
                with running(contestant, image) as url, tqdm(unit="rate") as progress:
                    search = _Search(contestant, url, image, settings, progress)
                    found["offline"].append(search.offline(start_rate))
                    found["server"] += [
                        search.highest(bound, start_rate, settings.rates) for bound in bounds
                    ]
            except (ServerFailed, Failed) as failure:
                found["server"].append({"contestant": contestant.name, "failed": str(failure)})
    return found


class _Search:
    """Searches for the highest rate that a running server holds."""

    def __init__(
        self, contestant: Contestant, url: str, image: bytes, settings: Settings, progress: tqdm
    ) -> None:
        self._contestant, self._url, self._image = contestant, url, image
        self._settings, self._progress = settings, progress
        progress.set_description(f"LoadGen, {contestant.name}")

    def _run(self, rate: float, bound: float | None, queries: int) -> dict[str, Any]:
        self._progress.set_postfix_str(f"{rate:.2f} a second, p99 under {bound} s")
        found = isolated(run, self._contestant, self._url, self._image, rate, bound, queries)
        self._progress.update()
        return found

    def offline(self, rate: float) -> dict[str, Any]:
        """Offline scenario: all queries at once, as many as `rate` gives in 20 seconds."""
        found = self._run(rate, None, max(1, round(rate * 20)))
        return {"contestant": self._contestant.name} | found

    def highest(self, bound: float, start: float, rates: int) -> dict[str, Any]:
        """Bisection between 0 and 1.2 times the closed-loop rate `start`."""
        tried: list[dict[str, Any]] = []
        rate: float | None = 0.9 * start
        while rate is not None and len(tried) < rates:
            queries = max(self._settings.least_queries, round(rate * bound * self._settings.hold))
            if bound < 1 and self._settings.rates > 2:  # often cheap enough for a valid p99
                queries = max(queries, min(_ENOUGH, round(rate * _LONGEST_TEST)))
            found = self._run(rate, bound, queries)
            tried.append(found | {"held": held(found)})
            rate = highest(0.0, 1.2 * start, [(t["rate"], t["held"]) for t in tried])
        best = max((t for t in tried if t["held"]), key=lambda t: t["rate"], default=None)
        return {
            "contestant": self._contestant.name,
            "bound_s": bound,
            "highest_rate": best["rate"] if best else None,
            "p99_ms": best["p99_ms"] if best else None,
            "certain": bool(best and best["valid"]),
            "tried": tried,
        }
