"""What the server tells Prometheus. One object for each app, so that tests don't share counts."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters and histograms by what they measure; names start with `vignette_`."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "vignette_requests",
            "Caption requests by outcome: ok, cancelled, or the error code of the answer",
            ["outcome"],
            registry=registry,
        )
        self.waiting = Gauge(
            "vignette_queue_length", "Requests that wait for a slot", registry=registry
        )
        self.running = Gauge(
            "vignette_running_rows", "Sequences that are being decoded", registry=registry
        )
        self.decode_rows = Histogram(
            "vignette_decode_batch_rows", "Rows of a decode step", buckets=_ROWS, registry=registry
        )
        self.encode_images = Histogram(
            "vignette_encode_batch_images",
            "Images admitted to a step",
            buckets=_ROWS,
            registry=registry,
        )
        self.stage = Histogram(
            "vignette_stage_seconds",
            "Time of a request in each stage: preprocess, queue, encode, decode, total",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
