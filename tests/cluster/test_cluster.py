"""Parts of the service over a Ray cluster; `bench.reliability` tries it whole (dying-cluster)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import zmq
from msgspec import msgpack
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from runtime.model import manifest as manifests
from runtime.request import (
    Completion,
    FinishReason,
    GenerationRequest,
    Priority,
    RequestOutput,
    SamplingParams,
    SchedulingParams,
)
from server.cluster.application import one_for_each_node
from server.cluster.ingress import ModelRelay
from server.cluster.registry import CLUSTER_STATE, IngressReport, Registry, ReplicaReport
from server.cluster.relay import Relay
from server.cluster.replica import REQUEST_DECODER, ReplicaOutput
from server.ipc.messages import (
    TO_FRONT_END,
    Cancel,
    FailureReason,
    Generate,
    Unserved,
    WorkerFacts,
    WorkerState,
    packed,
)
from server.model_files import ModelFiles, kind_digest
from server.settings import LOCAL, InvalidSettings, from_command_line
from tests.support.fakes import image

DIED = ActorDiedError()
DEMO = Path("engines/demo")


class Response:
    """A replica's response: its messages, and whether it was cancelled."""

    def __init__(self, news: list[ReplicaOutput | Exception | None]) -> None:
        self._news, self.cancelled = news, False

    def __await__(self):
        return self._one().__await__()

    async def _one(self) -> bytes:
        return await anext(aiter(self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for said in self._news:
            if said is None:
                await asyncio.Event().wait()
            if isinstance(said, Exception):
                raise said
            yield msgpack.encode(said)

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """A deployment handle whose calls get the given answers in order."""

    def __init__(self, *answers: list[ReplicaOutput | Exception | None]) -> None:
        self._answers, self.asked, self.responses = list(answers), [], []
        self.caption = self.stream = self

    def options(self, stream: bool) -> "Replicas":
        return self

    def remote(self, asked: bytes, *pixels: bytes) -> Response:
        self.asked.append((REQUEST_DECODER.decode(asked), pixels))
        self.responses.append(Response(self._answers.pop(0)))
        return self.responses[-1]


class Socket:
    """A relay's socket: tests put messages in and read what was sent."""

    def __init__(self) -> None:
        self.coming, self.sent = asyncio.Queue(), []

    async def recv_multipart(self, flags=0):
        if flags and self.coming.empty():
            raise zmq.Again
        return await self.coming.get()

    async def send_multipart(self, parts):
        self.sent += TO_FRONT_END.decode(parts[1])


def said(*tokens: int, ends: bool = False, engine: str = "a") -> ReplicaOutput:
    reason = FinishReason.STOP if ends else None
    return ReplicaOutput(engine, RequestOutput(77, Completion(tokens, finish_reason=reason)))


def relayed(replicas: Replicas, stream: bool = True, then: Callable[[Socket], object] = str):
    """What a front-end receives for one request, number 5."""

    async def run() -> list:
        socket = Socket()
        relay = Relay(socket, replicas, "kind")  # type: ignore[arg-type]
        relay.stores[b"front"] = [image(9)]  # type: ignore[assignment]
        serving = asyncio.create_task(relay.run())
        scheduling = SchedulingParams(None, Priority.BATCH, time.perf_counter() + 20)
        request = GenerationRequest(None, (0, 4), SamplingParams(7), scheduling, stream, id=5)
        socket.coming.put_nowait([b"front", packed(Generate(request, 0, False, "digest"))])
        await asyncio.sleep(0.05)
        then(socket)
        await asyncio.sleep(0.05)
        relay.stop()
        await asyncio.wait_for(serving, 20)
        return socket.sent

    return asyncio.run(run())


def tokens(sent: list) -> list[tuple[int, ...]]:
    assert {message.output.id for message in sent} == {5}
    return [message.output.token_ids for message in sent]


def test_a_request_reaches_a_replica_whole():
    replicas = Replicas([said(3, 1, ends=True)])
    assert tokens(relayed(replicas, stream=False)) == [(3, 1)]
    [(asked, pixels)] = replicas.asked
    assert asked.request.prompt_ids == (0, 4)
    assert asked.request.sampling == SamplingParams(7)
    assert asked.request.scheduling.priority is Priority.BATCH
    assert (asked.digest, asked.kind) == ("digest", "kind")
    assert 15 < asked.seconds < 20  # seconds left: machines' clocks have no common origin
    assert b"".join(pixels) == image(9).tobytes()


def test_a_stream_goes_on_after_its_replica_died():
    replicas = Replicas([said(3), said(4), DIED], [DIED], [said(3), said(4, 5), said(1, ends=True)])
    sent = relayed(replicas)
    assert [t for told in tokens(sent) for t in told] == [3, 4, 5, 1]


def test_what_is_lost_again_and_again_is_given_up():
    assert relayed(Replicas(*[[DIED]] * 4)) == [Unserved(5, FailureReason.LOST)]


def test_a_stream_does_not_go_on_with_another_model():
    replicas = Replicas([said(3), DIED], [said(8, engine="b"), said(1, ends=True, engine="b")])
    sent = relayed(replicas)
    assert sent[-1] == Unserved(5, FailureReason.REPLACED)
    assert tokens(sent[:-1]) == [(3,)]


def test_what_was_not_begun_may_be_answered_by_another_model():
    replicas = Replicas([DIED], [said(8, 1, ends=True, engine="b")])
    assert tokens(relayed(replicas)) == [(8, 1)]


@pytest.mark.parametrize("reason", list(FailureReason))
def test_what_a_replica_found_out_is_told(reason):
    assert relayed(Replicas([ReplicaOutput("a", None, reason)]), stream=False) == [
        Unserved(5, reason)
    ]


def test_a_full_cluster_is_told_and_not_asked_again():
    replicas = Replicas([BackPressureError(1, 1)])
    assert relayed(replicas) == [Unserved(5, FailureReason.FULL)]
    assert len(replicas.asked) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_who_gives_up_takes_the_request_back_from_the_replica(stream):
    replicas = Replicas([None])
    gone = relayed(replicas, stream, lambda it: it.coming.put_nowait([b"front", packed(Cancel(5))]))
    assert gone == []
    assert replicas.responses[0].cancelled


def report(name: str = "r1", state: str = "ready", slots: int = 16) -> bytes:
    return msgpack.encode(replica(name, state, slots))


def replica(
    name: str = "r1", state: str = "ready", slots: int = 16, precision: str = "fp32"
) -> ReplicaReport:
    facts = WorkerFacts("e", precision, "cpu", "cpu", "passed", 0.1, slots)
    worker = WorkerState("m", "cpu", 0, 1, state, 1, 2, None, facts)
    return ReplicaReport(name, f"node of {name}", "k", worker)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_who_is_not_heard_of_is_gone():
    clock = Clock()
    heard = Registry(clock)
    heard.report_replica(report("r1"))
    clock.now += 6
    heard.report_replica(report("r2"))
    ingress = IngressReport("d1", "http://d1", b"", {})
    assert len(CLUSTER_STATE.decode(heard.report_ingress(msgpack.encode(ingress))).replicas) == 2
    clock.now += 2
    known = CLUSTER_STATE.decode(heard.state())
    assert [replica.name for replica in known.replicas] == ["r2"]
    assert [ingress.url for ingress in known.ingresses] == ["http://d1"]


def test_an_image_that_one_door_refuses_is_refused_by_all_until_then():
    clock = Clock()
    heard = Registry(clock)
    heard.report_ingress(msgpack.encode(IngressReport("d1", "", b"", {"m": {"bad": 500.0}})))
    clock.now += 100
    second = msgpack.encode(IngressReport("d2", "", b"", {}))
    assert CLUSTER_STATE.decode(heard.report_ingress(second)).refused == {"m": {"bad": 400.0}}
    clock.now += 401
    assert CLUSTER_STATE.decode(heard.report_ingress(second)).refused == {"m": {}}


def test_notices_that_were_just_born_say_so():
    clock = Clock()
    heard = Registry(clock)
    assert not CLUSTER_STATE.decode(heard.state()).complete
    clock.now += 6
    assert CLUSTER_STATE.decode(heard.state()).complete


def test_front_ends_see_one_worker_for_all_replicas(monkeypatch, tmp_path):
    monkeypatch.setattr(ModelRelay, "_serve", lambda self: asyncio.sleep(20))

    async def run() -> None:
        line = ModelRelay(tmp_path, 0, "m", "k")
        assert line.follow([]).state == "starting"
        others = replica("r2", slots=8), replica("r3", "starting")
        state = line.follow([replica("r1", slots=16), *others])
        assert state.state == "ready"
        assert state.facts is not None
        assert (state.facts.engines, state.facts.slots, state.restarts) == (2, 8, 6)
        assert "node of r1, node of r2" in state.device
        mixed = line.follow([replica("r1"), replica("r2", precision="int8")]).facts
        assert mixed.identity not in {
            state.facts.identity,
            replica(precision="int8").state.facts.identity,
        }
        assert line.follow([]).state == "recovering"
        assert line.follow([replica()]).epoch == 2  # a new epoch: pending requests are sent again
        line.close()

    asyncio.run(run())


def test_doors_know_a_model_by_its_card(tmp_path):
    files = ModelFiles.of(DEMO)
    assert ModelFiles.of(files.write(tmp_path / "files")) == files


def test_only_an_engine_of_other_tokens_or_images_is_another_kind():
    manifest = manifests.read(DEMO)
    kind = kind_digest(manifest)
    weights = manifest.files | {"decoder.onnx": "0" * 64}
    assert kind_digest(replace(manifest, files=weights, about="trained longer")) == kind
    tokenizer = manifest.files | {"tokenizer.json": "0" * 64}
    assert kind_digest(replace(manifest, files=tokenizer)) != kind
    assert kind_digest(replace(manifest, sizes=replace(manifest.sizes, image=10))) != kind


def test_doors_are_as_many_as_nodes(monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}, {"Alive": True}])

    context = SimpleNamespace(policy_state={})
    assert one_for_each_node(context)[0] == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "address"),
    [
        (["--ray"], LOCAL),
        (["--ray", "--port", "1"], LOCAL),
        (["--ray", "auto"], "auto"),
        ([], None),
    ],
)
def test_ray_is_given_an_address_or_none(flags, address):
    assert from_command_line(flags).ray == address


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--ray-replicas", "8-1"], "the fewest come first"),
        (["--ray-replicas", "some"], "--ray-replicas"),
        (["--ray", "--ray-detach"], "give its address"),
    ],
)
def test_what_can_not_be_asked_of_a_cluster_is_said(flags, problem):
    with pytest.raises(InvalidSettings, match=problem):
        from_command_line(flags)
