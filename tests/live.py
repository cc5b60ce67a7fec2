"""A server on a real socket, in a thread of the test's process, around any engine."""

import asyncio
import http.client
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tornado.httpserver
import tornado.netutil
from PIL import Image

from runtime.engine import Engine
from server.admission import State
from server.app import make_app
from server.service import Service, make_service
from server.settings import Settings


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
    port: int
    loop: asyncio.AbstractEventLoop

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        return fetch(self.port, method, path, body, **headers)

    def caption(self, body: Any, query: str = "", **headers: str) -> Reply:
        return self.request("POST", f"/caption{query}", body, **headers)

    def metric(self, name: str) -> float:
        lines = self.request("GET", "/metrics").body.decode().splitlines()
        return next((float(x.rpartition(" ")[2]) for x in lines if x.startswith(name + " ")), 0.0)


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
    """Run a server; with `wait` off it may still be starting when it is handed over."""
    started = threading.Event()
    live: list[Live] = []
    stop: list[asyncio.Event] = []

    async def run() -> None:
        service = make_service(Settings(_env_file=None, **settings), open_engine)
        server = tornado.httpserver.HTTPServer(make_app(service))
        sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        stop.append(asyncio.Event())
        live.append(Live(service, sockets[0].getsockname()[1], asyncio.get_running_loop()))
        if not wait:
            started.set()
        service.engine = await service.worker.start()
        service.admission.slots = service.engine.config.slots
        service.admission.state = State.READY
        started.set()
        await stop[0].wait()
        server.stop()
        await server.close_all_connections()
        await service.worker.stop(30)
        service.decoders.shutdown()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(60)
    try:
        yield live[0]
    finally:
        live[0].loop.call_soon_threadsafe(stop[0].set)
        thread.join(60)
        assert not thread.is_alive()


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
