"""Pages, health and the like: how often a client may ask for what is no caption."""

import contextlib
import socket
import time

from server.service import service as services
from tests.fakes import fake_engine
from tests.live import png, serve


def test_who_asks_for_pages_all_the_time_has_to_wait():
    with serve(fake_engine) as live:
        live.service.visits.spend("127.0.0.1", 400 + 100)
        start = time.perf_counter()
        assert live.request("GET", "/health/live").status == 200
        assert time.perf_counter() - start > 0.3
        assert live.caption(png()).status == 200, "captions are not counted among them"


def test_large_pages_are_refused_to_who_asks_for_too_many_of_them(monkeypatch):
    monkeypatch.setattr(services, "_PAGES_SECONDS", 0.5)
    asked = b"GET /static/swagger-ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve(fake_engine) as live, contextlib.ExitStack() as held:
        clients = [
            held.enter_context(socket.create_connection(("127.0.0.1", live.port)))
            for _ in range(30)
        ]
        for client in clients:
            client.sendall(asked)
        assert live.caption(png()).status == 200
        told = [client.recv(12) for client in clients]
        assert told.count(b"HTTP/1.1 429") >= 15
        assert told.count(b"HTTP/1.1 200") >= 7


def test_large_pages_are_refused_while_many_lie_unread():
    with serve(fake_engine) as live:
        live.service.budget.hold_answer(200_000_000, "another")
        reply = live.request("GET", "/static/swagger-ui/swagger-ui-bundle.js")
        assert (reply.status, reply.error) == (429, "queue_full")
        assert live.caption(png()).status == 200
        live.service.budget.release_answer(200_000_000, "another")


def test_preflights_are_paced_as_pages_are():
    with serve(fake_engine, cors_origins=("*",)) as live:
        live.service.visits.spend("127.0.0.1", 400 + 100)
        start = time.perf_counter()
        assert live.request("OPTIONS", "/caption", Origin="https://a.example").status == 204
        assert time.perf_counter() - start > 0.3
