"""Traces: a span for each request, its stages within it, under the client's own span."""

import asyncio
import sys

import pytest

from server.grpc.service import InferenceService
from server.grpc.stubs import grpc_service_pb2 as pb
from server.settings import InvalidSettings
from server.telemetry.tracing import Tracer
from tests.support.fakes import fake_engine
from tests.support.live import png, serve

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_with_its_stages():
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    with serve(fake_engine) as live:
        live.service.tracer = Tracer("", exporter)
        assert live.caption(png(), traceparent=PARENT, X_Request_Id="mine").status == 200
        assert live.caption(b"x").status == 400
        for method in ("GET", "MADE-UP"):
            assert live.request(method, "/caption").status == 405
        live.service.tracer.close()
    spans = exporter.get_finished_spans()
    good, bad = (s for s in spans if s.name == "POST /caption")
    assert good.attributes["vignette.outcome"] == "ok"
    assert good.attributes["vignette.request_id"] == "mine"
    assert f"{good.context.trace_id:032x}" == PARENT.split("-")[1]
    assert bad.attributes["vignette.outcome"] == "invalid_image"
    assert {s.name for s in spans} >= {"GET /caption", "HTTP /caption"}
    assert not any("MADE-UP" in s.name for s in spans)
    stages = [s for s in spans if s.parent and s.parent.span_id == good.context.span_id]
    assert [s.name for s in stages] == ["preprocess", "queue", "encode", "decode"]
    assert all(good.start_time <= s.start_time <= s.end_time <= good.end_time for s in stages)


def test_a_call_over_grpc_is_a_span_too():
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()

    class Context:
        def invocation_metadata(self):
            return (("traceparent", PARENT),)

        def peer(self):
            return "ipv4:127.0.0.1:5"

        def time_remaining(self):
            return None

        async def abort(self, *refusal):
            raise RuntimeError(refusal)

    with serve(fake_engine) as live:
        live.service.tracer = Tracer("", exporter)
        request = pb.ModelInferRequest(model_name="fake", id="mine")
        request.inputs.add(name="IMAGE", datatype="BYTES", shape=[1])
        request.inputs[0].contents.bytes_contents.append(png())
        ours = InferenceService(live.service)
        for call in (request, pb.ModelInferRequest(model_name="other")):
            asked = ours.ModelInfer(call.SerializeToString(), Context())
            answered = asyncio.run_coroutine_threadsafe(asked, live.loop)
            assert (answered.exception(20) is None) == (call is request)
        live.service.tracer.close()
    spans = exporter.get_finished_spans()
    good, bad = (s for s in spans if s.name == "ModelInfer")
    assert (good.attributes["vignette.outcome"], good.attributes["vignette.request_id"]) == (
        "ok",
        "mine",
    )
    assert f"{good.context.trace_id:032x}" == PARENT.split("-")[1]
    assert bad.attributes["vignette.outcome"] == "unknown_model"
    assert {"preprocess", "queue", "encode", "decode"} <= {s.name for s in spans}


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(InvalidSettings, match=r"\.\[otel\]"):
        Tracer("http://localhost:4318/v1/traces")
