"""Prometheus metrics.

In a running server, each process counts into files in the run's folder, and the front-end that is
scraped adds them up (prometheus_client's multi-process mode, which `count_as` switches on). The
supervisor creates the files at full size, and a restarted process continues in those of its
predecessor. Tests have one process, and one Metrics object for each app, so that apps don't share
counts.
"""

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from server.ipc.shared import reserve

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # names prometheus_client's folder in multi-process mode
_FOLDER = "metrics"  # in the run's folder
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LIVE = "gauge_livesum"  # gauges that are cleared when their process dies
_COUNTER = "counter"
_KINDS = (_COUNTER, "histogram", "gauge_max", _LIVE)
_REST = 4  # pause between renderings, as a multiple of the time one takes
_KEY_BYTES = 20 * 160  # outcomes, times the bytes of each
_FILE_BYTES = 64 * 1024  # prometheus_client's default, several times what a model needs


def make_files(
    run: Path, front_ends: Collection[str], workers: Collection[str], keys: int = 0, models: int = 1
) -> None:
    """Create the files of the processes with these names. Raises NoSharedMemory.

    run: the run's folder. keys, models: number of API keys, which front-ends count, and of models.
    """
    folder = run / _FOLDER
    folder.mkdir()
    for name in (*front_ends, *workers):
        for kind in _KINDS:
            size = models * _FILE_BYTES
            if kind == _COUNTER and name in front_ends:
                size += 2 * keys * _KEY_BYTES
            handle = os.open(folder / f"{kind}_{name}.db", os.O_RDWR | os.O_CREAT, 0o600)
            reserve(handle, size, "metrics", "free some of it")
            os.close(handle)


def count_as(run: Path, name: str) -> None:
    """Count under this name in this process from now on."""
    os.environ[_VARIABLE] = str(run / _FOLDER)
    values.ValueClass = values.MultiProcessValue(lambda: name)


def forget_gauges(run: Path, name: str) -> None:
    """Clear the gauges of a process that has died; its counters stay."""
    with (
        contextlib.suppress(FileNotFoundError),  # somebody cleans temporary folders
        (run / _FOLDER / f"{_LIVE}_{name}.db").open("r+b") as file,
    ):
        file.write(bytes(Path(file.name).stat().st_size))


class Metrics:
    """Metrics of a front-end; names start with `vignette_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.rest = _REST
        self._render_at = 0.0  # earliest next rendering (`time.monotonic`)
        self._rendering: asyncio.Task[bytes]
        self.requests = Counter(
            "vignette_requests",
            "Requests by model (none if it was refused before that was known) and outcome: ok, "
            "cancelled, or the error code of the answer",
            ["model", "outcome"],
            registry=registry,
        )
        self.by_key = Counter(
            "vignette_key_requests",
            "Caption requests by the name of their API key, and outcome",
            ["key", "outcome"],
            registry=registry,
        )
        self.inside = Gauge(
            "vignette_requests_inside",
            "Requests that were let in and not answered yet",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.restarts = Gauge(
            "vignette_worker_restarts",
            "How often each engine worker was started again",
            ["model", "worker"],
            registry=registry,
            multiprocess_mode="max",
        )
        self.cache_hits = Counter(
            "vignette_cache_hits", "Captions that were known already", ["model"], registry=registry
        )
        self.stage = Histogram(
            "vignette_stage_seconds",
            "Time of a request in each stage: preprocess, queue, encode, decode, total",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )

    async def rendered(self) -> bytes:
        """The result of `render`, or its last one: rendering takes at most a fifth of the time.

        With many API keys, one rendering takes a tenth of a second.
        """
        if time.monotonic() >= self._render_at:
            self._render_at = math.inf
            self._rendering = asyncio.create_task(self._render())
        return await asyncio.shield(self._rendering)

    async def captioned(self, model: str) -> int:
        """Number of a model's requests that were captioned, by all processes."""
        wanted, name = {"model": model, "outcome": "ok"}, "vignette_requests_total"
        lines = (await self.rendered()).decode().splitlines()
        text = "\n".join(line for line in lines if line.startswith(name))
        return sum(
            int(sample.value)
            for family in text_string_to_metric_families(f"{text}\n")
            for sample in family.samples
            if sample.name == name and sample.labels == wanted
        )

    async def _render(self) -> bytes:
        started = time.monotonic()
        try:
            return await asyncio.to_thread(self.render)
        finally:
            now = time.monotonic()
            self._render_at = now + self.rest * (now - started)

    def render(self) -> bytes:
        """Metrics of all processes in Prometheus' text format."""
        registry = self.registry
        if _VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)


class WorkerMetrics:
    """Metrics of an engine worker. registry: None in a worker process."""

    def __init__(self, model: str, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        gauge = partial(Gauge, labelnames=["model"], registry=registry, multiprocess_mode="livesum")
        rows = partial(Histogram, labelnames=["model"], buckets=_ROWS, registry=registry)
        self.waiting = gauge(
            "vignette_queue_length", "Requests in a worker that wait for a slot"
        ).labels(model)
        self.running = gauge(
            "vignette_running_sequences", "Sequences that are being decoded"
        ).labels(model)
        self.graphs = gauge(
            "vignette_cuda_graphs", "Engine workers on a GPU that launch captured graphs"
        ).labels(model)
        self.decode_rows = rows("vignette_decode_batch_rows", "Rows of a decode step").labels(model)
        self.encode_images = rows(
            "vignette_encode_batch_images", "Images admitted to a step"
        ).labels(model)
