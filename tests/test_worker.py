"""The engine worker by itself."""

import json

import pytest

from runtime.planning.config import EngineConfig
from server.metrics import WorkerMetrics
from server.processes.worker import Worker
from tests.fakes import FakeRunner, fake_engine, image

ASKED = {"op": "caption", "slot": 0, "prompt": None, "max_new_tokens": 3, "queued_at": 0.0,
         "urgent": True, "deadline": None, "alone": False}  # fmt: skip


class Socket:
    def __init__(self):
        self.jobs, self.sent = [], []

    def poll(self, timeout=None):
        return bool(self.jobs)

    def recv_multipart(self):
        return self.jobs.pop(0)

    def send_multipart(self, parts):
        self.sent.append((parts[0], json.loads(parts[1])))

    def ask(self, owner, number, **changes):
        message = {**ASKED, "id": number, **changes}
        self.jobs.append([owner, json.dumps(message).encode()])

    def said(self, op):
        return [message["id"] for _, message in self.sent if message["op"] == op]


class Store:
    """A single slot."""

    def __init__(self, number):
        self._pixels, self.started = image(number), [0]

    def __getitem__(self, slot):
        return [self._pixels][slot]


@pytest.fixture
def made():
    engine, socket = fake_engine(EngineConfig(slots=4, encode_batch=4, patience=0)), Socket()
    worker = Worker(engine, socket, WorkerMetrics())
    worker._stores = {b"a": Store(1), b"b": Store(2)}
    return worker, engine, socket


def turn(worker):
    worker._take_in()
    worker._submit_held()
    worker._step()


def test_a_process_that_keeps_failing_is_left(made):
    """After three failed steps it is the process that is suspected, not the images."""

    class Broken(FakeRunner):
        def decode(self, tokens, fed, forced=()):
            raise RuntimeError("illegal memory access")

    worker, engine, socket = made
    engine.runner = Broken()
    for number in (1, 2, 3):
        assert not worker.broken
        socket.ask(b"a", number)
        turn(worker)
    assert worker.broken and worker.stopping
    assert socket.said("failed") == [1, 2]
    assert worker._stores[b"a"].started == [3]


def test_a_suspect_runs_alone_whichever_front_end_sends_what(made):
    worker, engine, socket = made
    socket.ask(b"a", 1, max_new_tokens=2)
    socket.ask(b"b", 2, alone=True)
    socket.ask(b"a", 3, alone=True)
    socket.ask(b"b", 4)
    socket.ask(b"a", 5)
    for _ in range(40):
        turn(worker)
    assert socket.said("answer") == [1, 2, 3, 4, 5]
    assert engine.runner.encoded == [1, 1, 1, 2]


def test_what_waits_behind_a_suspect_can_be_taken_back(made):
    worker, engine, socket = made
    socket.ask(b"a", 1, max_new_tokens=2)
    socket.ask(b"b", 2, alone=True)
    socket.ask(b"a", 3)
    turn(worker)
    socket.jobs.append([b"a", json.dumps({"op": "cancel", "id": 3}).encode()])
    worker.gone.put(b"b")
    for _ in range(20):
        turn(worker)
    assert socket.said("answer") == [1]
    assert engine.runner.encoded == [1]


def test_a_front_end_that_has_gone_already_does_no_harm(made, tmp_path):
    worker, _, socket = made
    hello = {"op": "hello", "store": str(tmp_path / "gone"), "slots": 1, "shape": [3, 4, 4]}
    socket.jobs.append([b"c", json.dumps(hello).encode()])
    socket.ask(b"c", 1)
    socket.ask(b"a", 2)
    for _ in range(10):
        turn(worker)
    assert socket.said("error") == [1]
    assert socket.said("answer") == [2]
