"""OpenTelemetry traces of requests, with the otel extra and a collector.

A request's span is recorded when the request ends, with one child for each stage; its parent is the
client's `traceparent`, if sent.
"""

import time
from collections.abc import Mapping
from typing import Any

from server.settings import InvalidSettings


class Tracer:
    """Sends spans to a collector over OTLP/HTTP, in batches and off the event loop."""

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        """endpoint: such as http://localhost:4318/v1/traces. Raises InvalidSettings."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as cause:
            raise InvalidSettings(
                f"--traces needs {cause.name}: install the otel extra (pip install -e '.[otel]')"
            ) from cause
        # Not the global one, which parses `baggage`, too, in time quadratic in its length.
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": "vignette"}))
        self._provider.add_span_processor(
            BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint=endpoint))
        )
        self._tracer = self._provider.get_tracer("vignette")

    def record(
        self,
        name: str,
        headers: Mapping[str, str],
        outcome: str,
        stages: Mapping[str, float],
        total: float,
        request_id: str,
    ) -> None:
        """Record a request that just ended. name: of its span. stages: seconds each, in order."""
        from opentelemetry.trace import set_span_in_context

        end = time.time_ns()
        start = end - round(total * 1e9)
        parent = self._propagator.extract({k.lower(): v for k, v in headers.items()})
        span = self._tracer.start_span(
            name,
            context=parent,
            start_time=start,
            attributes={"vignette.outcome": outcome, "vignette.request_id": request_id},
        )
        inside, at = set_span_in_context(span), start
        for stage, seconds in stages.items():
            child = self._tracer.start_span(stage, context=inside, start_time=at)
            at += round(seconds * 1e9)
            child.end(at)
        span.end(end)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()
