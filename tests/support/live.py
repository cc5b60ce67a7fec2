"""A server on a real socket, in a thread of the test's process, around any engine."""

import asyncio
import base64
import http.client
import io
import json
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tornado.netutil
import zmq
import zmq.asyncio
from PIL import Image

from runtime.engine import Engine
from server.http.app import Application, make_app, make_ops_app
from server.ipc.messages import Serving, WorkerFacts, WorkerState, worker_address
from server.processes.frontend import listen, update
from server.processes.worker import Worker
from server.service.assembly import make_service
from server.service.model import Model
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import WorkerMetrics
from tests.support.fakes import MANIFEST, FakeTokenizer

JSON = {"Content_Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"code", "message"}
        return self.json["error"]["code"]


@dataclass
class Live:
    service: Service
    app: Application
    port: int
    ops_port: int
    loop: asyncio.AbstractEventLoop

    @property
    def model(self) -> Model:
        return self.service.model()

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        return fetch(self.port, method, path, body, **headers)

    def caption(self, body: Any, query: str = "", **headers: str) -> Reply:
        return self.request("POST", f"/caption{query}", body, **headers)

    def metric(self, name: str) -> float:
        """A metric's sum over all models; `name` has the other labels."""
        text = self.request("GET", "/metrics").body.decode()
        lines = re.sub('{?model="[^"]*"(,|})', _without_model, text).splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(name + " "))


def _without_model(found: re.Match[str]) -> str:
    return "{" if found[0].startswith("{") and found[1] == "," else ""


def fetch(port: int, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return Reply(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


@contextmanager
def serve(
    open_engine: Callable[[], Engine], *, wait: bool = True, **settings: Any
) -> Iterator[Live]:
    """A front-end, and a worker around `open_engine()` in a thread instead of a process.

    Without `wait`, the service may still be starting when it is yielded.
    """
    started = threading.Event()
    live: list[Live] = []
    stop: list[asyncio.Event] = []
    manifest = settings.pop("manifest", MANIFEST)
    folder = Path(tempfile.mkdtemp(prefix="live-"))

    async def run() -> None:
        given = Settings(_env_file=None, decoders=1, front_ends=1, **settings)
        known = {manifest.model: (manifest, FakeTokenizer())}
        service = make_service(given, known, folder, 0, 0)
        service.metrics.rest = 0  # no caching: every scrape shows the current values
        public, ops = (tornado.netutil.bind_sockets(0, "127.0.0.1") for _ in range(2))
        app = make_app(service)
        servers = listen(service, app, public), listen(service, make_ops_app(service), ops)
        ports = public[0].getsockname()[1], ops[0].getsockname()[1]
        stop.append(asyncio.Event())
        loop = asyncio.get_running_loop()
        live.append(Live(service, app, *ports, loop))
        worker = _WorkerThread(open_engine, live[0], folder)
        worker.start()
        if not wait:
            started.set()
        while not service.serves and not stop[0].is_set():
            await asyncio.sleep(0.005)
        started.set()
        await stop[0].wait()
        for server in servers:
            server.stop()
            await server.close_all_connections()
        await service.model().links.close()
        await asyncio.to_thread(worker.finish)
        service.decoders.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),), daemon=True)
    thread.start()
    try:
        assert started.wait(60)
        yield live[0]
    finally:
        if live and stop:
            live[0].loop.call_soon_threadsafe(stop[0].set)
        thread.join(60)
        assert not thread.is_alive()
        shutil.rmtree(folder)


class _WorkerThread(threading.Thread):
    def __init__(self, open_engine: Callable[[], Engine], live: Live, folder: Path) -> None:
        super().__init__(daemon=True)
        self._open, self._live, self._folder = open_engine, live, folder
        self._worker: Worker | None = None

    def run(self) -> None:
        asyncio.run(self._serve(self._open()))

    async def _serve(self, engine: Engine) -> None:
        context = zmq.asyncio.Context()
        router = context.socket(zmq.ROUTER)
        router.bind(worker_address(self._folder, 0, 1))
        service = self._live.service
        model = service.model().name
        worker = Worker(engine, router, WorkerMetrics(model, service.metrics.registry))
        self._loop, self._worker = asyncio.get_running_loop(), worker
        facts = WorkerFacts(
            engine="fake", precision="fake", runs_on="fake", provider="fake", self_test="passed",
            self_test_seconds=None, slots=engine.slots,
        )  # fmt: skip
        serving = Serving((WorkerState(model, "cpu", 0, 1, "ready", 1, 0, None, facts),), {}, 0)
        self._live.loop.call_soon_threadsafe(update, service, serving)
        await worker.run()
        router.close(linger=0)
        context.term()

    def finish(self) -> None:
        if self._worker is not None:
            self._loop.call_soon_threadsafe(self._worker.stop)
            self.join(30)
            assert not self.is_alive()


def png(colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def multipart(**fields: bytes | str) -> tuple[bytes, str]:
    """Body and Content-Type of a form; `bytes` become files."""
    parts = []
    for name, value in fields.items():
        file = '; filename="x.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        head = f'--frontier\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + b"--frontier--\r\n", "multipart/form-data; boundary=frontier"


def as_json(**fields) -> bytes:
    return json.dumps(fields).encode()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def abort(port: int, head: str, body: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"POST /caption{head}\r\n\r\n".encode() + body)
    return client


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def requests_in(dispatcher) -> int:
    """Number of requests that a dispatcher holds."""
    inside = sum(len(link.inside) for link in dispatcher._links.values())
    return inside + len(dispatcher._pending) + len(dispatcher._suspects)


def small_images(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number:03}.png" for number in range(count)]
    for number, file in enumerate(files):
        Image.new("RGB", (4, 4), (number, number, number)).save(file)
    return files
