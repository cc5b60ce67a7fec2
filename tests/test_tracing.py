"""Traces: a span for each request, its stages within it, under the client's own span."""

import sys

import pytest

from server.tracing import CannotTrace, Tracer
from tests.fakes import fake_engine
from tests.live import png, serve


def test_a_request_is_a_span_with_its_stages():
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serve(fake_engine) as live:
        live.service.tracer = Tracer("", exporter)
        assert live.caption(png(), traceparent=parent, X_Request_Id="mine").status == 200
        assert live.caption(b"x").status == 400
        live.service.tracer.close()
    spans = exporter.get_finished_spans()
    good, bad = (s for s in spans if s.name == "POST /caption")
    assert good.attributes["vignette.outcome"] == "ok"
    assert good.attributes["vignette.request_id"] == "mine"
    assert f"{good.context.trace_id:032x}" == parent.split("-")[1]
    assert bad.attributes["vignette.outcome"] == "invalid_image"
    stages = [s for s in spans if s.parent and s.parent.span_id == good.context.span_id]
    assert [s.name for s in stages] == ["preprocess", "queue", "encode", "decode"]
    assert all(good.start_time <= s.start_time <= s.end_time <= good.end_time for s in stages)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(CannotTrace, match=r"\.\[otel\]"):
        Tracer("http://localhost:4318/v1/traces")
