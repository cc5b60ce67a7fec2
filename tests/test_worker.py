"""The engine worker by itself."""

import json

from server.metrics import WorkerMetrics
from server.worker import Worker
from tests.fakes import FakeRunner, fake_engine, image


def test_a_process_that_keeps_failing_is_left():
    """After three failed steps it is the process that is suspected, not the images."""

    class Socket:
        def __init__(self, jobs):
            self.jobs, self.sent = jobs, []

        def poll(self, timeout=None):
            return bool(self.jobs)

        def recv_multipart(self):
            return self.jobs.pop(0)

        def send_multipart(self, parts):
            self.sent.append(json.loads(parts[1]))

    class Broken(FakeRunner):
        def decode(self, tokens, fed, steps=1):
            raise RuntimeError("illegal memory access")

    engine = fake_engine()
    engine.runner = Broken()
    asked = {"op": "caption", "slot": 0, "prompt": None, "max_new_tokens": 3, "queued_at": 0.0,
             "urgent": True, "deadline": None}  # fmt: skip
    socket = Socket([])
    worker = Worker(engine, socket, WorkerMetrics())
    worker._stores[b"front"] = [image(1)]
    for number in range(3):
        assert not worker.broken
        socket.jobs.append([b"front", json.dumps({**asked, "id": number}).encode()])
        worker._take_in()
        worker._step()
    assert worker.broken and worker.stopping
    assert [m["op"] for m in socket.sent] == ["started", "failed", "started", "failed", "started"]
