"""The engine worker by itself."""

import asyncio
import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import zmq

from runtime import engine
from runtime.errors import DeviceFailed
from runtime.planning.config import EngineConfig
from runtime.request import FinishReason, GenerationRequest, SamplingParams
from server.ipc.messages import (
    TO_FRONT_END,
    Cancel,
    FailureReason,
    Generate,
    Hello,
    Output,
    StepFailed,
    Unserved,
    packed,
)
from server.processes.worker import Worker, _precision
from server.telemetry.metrics import WorkerMetrics
from tests.support.fakes import MANIFEST, FakeRunner, fake_engine, image


class Socket:
    def __init__(self):
        self.coming, self.sent, self.messages = asyncio.Queue(), [], 0

    async def recv_multipart(self, flags=0):
        if flags and self.coming.empty():
            raise zmq.Again
        return await self.coming.get()

    async def send_multipart(self, parts):
        self.messages += 1
        self.sent += TO_FRONT_END.decode(parts[1])

    def ask(self, owner, number, most=3, alone=False):
        request = GenerationRequest(None, (0,), SamplingParams(most), id=number)
        self.say(owner, Generate(request, 0, alone))

    def say(self, owner, message):
        self.coming.put_nowait([owner, packed(message)])

    @property
    def answered(self):
        return [message.output.id for message in self.sent if isinstance(message, Output)]

    @property
    def failed(self):
        return [message.id for message in self.sent if isinstance(message, StepFailed)]


class Store:
    """A pixel store of a single slot."""

    def __init__(self, number):
        self._pixels, self.started = image(number), np.zeros(1, np.int64)

    def __getitem__(self, slot):
        return [self._pixels][slot]


class Scene:
    """A worker around a fake engine, with stores of the front-ends a and b."""

    def __init__(self):
        self.engine = fake_engine(EngineConfig(slots=4, encode_batch=4, patience=0))
        self.socket = Socket()
        self.worker = Worker(self.engine, self.socket, WorkerMetrics("fake"))
        self.stores = self.worker.stores = {b"a": Store(1), b"b": Store(2)}

    async def run(self, asked, then=lambda scene: None):
        """Run the worker until all requests are answered."""
        serving = asyncio.create_task(self.worker.run())
        asked(self)
        await asyncio.sleep(0.05)
        then(self)
        await asyncio.sleep(0.05)
        self.worker.stop()
        await asyncio.wait_for(serving, 20)


def scene(asked, then=lambda scene: None, prepare=lambda scene: None):
    async def run():
        made = Scene()
        prepare(made)
        await made.run(asked, then)
        return made

    return asyncio.run(run())


def test_a_process_that_keeps_failing_is_left():
    """After three failed steps it is the process that is suspected, not the images."""

    class Broken(FakeRunner):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            raise RuntimeError("illegal memory access")

    async def run():
        made = Scene()
        made.engine.runner = Broken()
        serving = asyncio.create_task(made.worker.run())
        for number in (1, 2, 3):
            assert not made.worker.broken
            made.socket.ask(b"a", number)
            while len(made.socket.failed) < number:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(serving, 20)
        return made

    made = asyncio.run(run())
    assert made.worker.broken
    assert made.socket.failed == [1, 2, 3]
    assert made.stores[b"a"].started[0] == 3


def test_a_process_whose_gpu_failed_is_left_at_once():
    class Faulty(FakeRunner):
        on_gpu = overlaps = True

        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            super().decode(tokens, fed, forced, candidates)
            return self

        def wait(self):
            raise DeviceFailed("CUDA's cudaEventSynchronize says cudaErrorIllegalAddress (700)")

    async def run():
        made = Scene()
        made.engine.runner = Faulty()
        serving = asyncio.create_task(made.worker.run())
        made.socket.ask(b"a", 1)
        await asyncio.wait_for(serving, 20)
        return made

    made = asyncio.run(run())
    assert made.worker.broken
    assert made.socket.failed == [1]


def test_a_process_that_can_take_no_requests_ends():
    """Else it would go on saying that it lives."""

    async def run():
        made = Scene()
        made.socket.coming.put_nowait([b"a", b"no message"])
        with pytest.raises(msgspec.DecodeError):
            await asyncio.wait_for(made.worker.run(), 20)

    asyncio.run(run())


def test_what_is_said_at_one_moment_is_one_message_and_leaves_before_the_end():
    async def run():
        made = Scene()
        serving = asyncio.create_task(made.worker.run())
        await asyncio.sleep(0.01)
        for number in (1, 2, 3):
            made.worker.send(b"a", StepFailed(number))
        made.worker.stop()
        await asyncio.wait_for(serving, 20)
        return made.socket

    socket = asyncio.run(run())
    assert (socket.messages, socket.failed) == (1, [1, 2, 3])


def test_a_suspect_runs_alone_whichever_front_end_sends_what():
    def asked(made):
        made.socket.ask(b"a", 1, most=2)
        made.socket.ask(b"b", 2, alone=True)
        made.socket.ask(b"a", 3, alone=True)
        made.socket.ask(b"b", 4)
        made.socket.ask(b"a", 5)

    made = scene(asked)
    assert made.socket.answered[:3] == [1, 2, 3]
    assert sorted(made.socket.answered) == [1, 2, 3, 4, 5]
    assert made.engine.runner.encoded[:3] == [1, 1, 1]


def test_what_waits_behind_a_suspect_can_be_taken_back():
    def asked(made):
        made.socket.ask(b"a", 1, most=30)
        made.socket.ask(b"b", 2, alone=True)
        made.socket.ask(b"a", 3)
        made.socket.say(b"a", Cancel(3))
        made.socket.ask(b"a", 4)
        made.socket.say(b"a", Cancel(4))

    class Held(FakeRunner):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            time.sleep(0.005)
            return super().decode(tokens, fed, forced, candidates)

    def prepare(made):
        made.engine.runner = Held()

    made = scene(asked, lambda made: made.worker.forget(b"b"), prepare)
    assert set(made.socket.answered) <= {1, 2}
    assert 1 in made.socket.answered


def test_what_is_being_decoded_can_be_taken_back():
    def asked(made):
        made.socket.ask(b"a", 1, most=32)
        made.socket.ask(b"b", 2, most=2)
        made.socket.say(b"a", Cancel(1))

    made = scene(asked)
    assert made.socket.answered == [2]
    assert made.engine.idle


def test_a_front_end_that_has_gone_already_does_no_harm(tmp_path):
    def asked(made):
        made.socket.say(b"c", Hello(str(tmp_path / "gone"), 1, (3, 4, 4)))
        made.socket.ask(b"c", 1)
        made.socket.ask(b"a", 2)

    made = scene(asked)
    assert made.socket.answered == [2]
    assert Unserved(1, FailureReason.NO_PIXELS) in made.socket.sent


def test_a_request_that_can_not_be_begun_fails_alone_and_is_not_tried_again(monkeypatch):
    def broken(*_):
        raise TypeError("a defect of ours")

    monkeypatch.setattr(engine, "Continuation", broken)
    made = scene(lambda made: made.socket.ask(b"a", 1))
    [answer] = made.socket.sent
    assert (answer.output.id, answer.output.finish_reason) == (1, FinishReason.ERROR)
    assert not made.worker.broken


def test_who_waits_behind_a_request_that_is_taken_back_goes_on():
    def asked(made):
        made.socket.ask(b"a", 1, most=30)
        made.socket.ask(b"b", 2, alone=True)
        made.socket.ask(b"a", 3, most=1)
        made.socket.say(b"b", Cancel(2))

    class Slow(FakeRunner):
        def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
            time.sleep(0.01)
            return super().decode(tokens, fed, forced, candidates)

    def prepare(made):
        made.engine.runner = Slow()

    made = scene(asked, prepare=prepare)
    assert made.socket.answered == [3, 1]


def test_who_reads_along_is_told_every_step():
    def asked(made):
        request = GenerationRequest(None, (0,), SamplingParams(6, True), stream=True, id=7)
        made.socket.say(b"a", Generate(request, slot=0, alone=False))

    made = scene(asked)
    assert made.socket.answered == [7] * 6
    tokens = [message.output.token_ids for message in made.socket.sent]
    [whole] = fake_engine().generate([image(1)], None, max_new_tokens=6, ignore_eos=True)
    assert sum(tokens, ()) == whole.token_ids


@pytest.mark.parametrize("alone", [False, True])
def test_it_stops_once_what_was_begun_is_finished(alone):
    async def run():
        made = Scene()
        for number in range(5):
            made.socket.ask(b"a", number, most=20, alone=alone)
        serving = asyncio.create_task(made.worker.run())
        await asyncio.sleep(0.01)
        made.worker.stop()
        await asyncio.wait_for(serving, 20)
        return made

    assert sorted(asyncio.run(run()).socket.answered) == [0, 1, 2, 3, 4]


def test_a_front_end_that_replaces_another_frees_what_that_had():
    async def run():
        made = Scene()
        for owner in (b"front-0-1", b"front-1-1"):
            made.worker.stores[owner] = Store(1)
        made.worker._open(b"front-0-2", Hello("nowhere", 1, (3, 4, 4)))
        return set(made.worker.stores)

    assert asyncio.run(run()) & {b"front-0-1", b"front-1-1"} == {b"front-1-1"}


@pytest.mark.parametrize(("positions", "told"), [(5, "fake, 5 text positions"), (64, "fake")])
def test_captions_that_may_be_cut_off_are_another_engine_s(positions, told):
    """Bulk runs know by it that a service was started with fewer positions, and don't mix them."""
    made = fake_engine()
    made.runner.plan = replace(made.runner.plan, text_tokens=positions)
    made.manifest = replace(MANIFEST, sizes=replace(MANIFEST.sizes, text=1024))
    assert _precision(made) == told
