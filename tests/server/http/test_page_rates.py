"""Pages, health and the like: how often a client may ask for what is no caption."""

import asyncio
import contextlib
import socket
import time
from itertools import product
from unittest.mock import Mock

import pytest
from tornado.httputil import HTTPHeaders
from tornado.iostream import IOStream

from server.fairness.turns import Turns
from server.http import held_connections, pages
from server.http.app import make_ops_app
from tests.support.fakes import fake_engine
from tests.support.live import fetch, png, serve, until


def test_who_asks_for_pages_all_the_time_has_to_wait():
    with serve(fake_engine) as live:
        live.service.rates.pages.spend("127.0.0.1", 400 + 100)
        start = time.perf_counter()
        assert live.request("GET", "/health/live").status == 200
        assert time.perf_counter() - start > 0.3
        assert live.caption(png()).status == 200, "captions are not counted among them"


@pytest.mark.parametrize(
    ("part", "client"),  # until a head has come, a proxy's client is not known
    [("head", "127.0.0.1"), *product(("body", "chunks"), ("127.0.0.1", "1.2.3.4"))],
)
def test_what_comes_in_small_pieces_is_read_as_one_while_its_client_owes(part, client, monkeypatch):
    """A piece of a byte takes as long to read as one of many."""
    proxies = [] if client == "127.0.0.1" else ["127.0.0.1"]
    reads, read = [], IOStream.read_from_fd

    def read_from_fd(stream, buf):
        count = read(stream, buf)
        reads.extend([count] if count else [])
        return count

    monkeypatch.setattr(IOStream, "read_from_fd", read_from_fd)
    lines = b"POST /caption HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 1.2.3.4\r\n"
    sized = lines + b"Content-Length: %d\r\n" % len(png())
    in_chunks = lines + b"Transfer-Encoding: chunked\r\n\r\n"
    at_once, pieces, last = {
        "head": (sized + b"X: ", [b"y"] * 60, b"\r\n\r\n" + png()),
        "body": (sized + b"\r\n" + png()[:-60], [png()[n : n + 1] for n in range(-60, -1)],
                 png()[-1:]),
        "chunks": (in_chunks, [b"1\r\n%c\r\n" % byte for byte in png()], b"0\r\n\r\n"),
    }[part]  # fmt: skip
    with (
        serve(fake_engine, trusted_proxies=proxies) as live,
        socket.create_connection(("127.0.0.1", live.port)) as sender,
    ):
        sender.settimeout(20)
        sender.sendall(at_once)
        until(lambda: reads)
        live.service.rates.pages.spend(client, 400 + 100)  # half a second
        for piece in pieces:
            time.sleep(0.002)
            sender.sendall(piece)
        sender.sendall(last)
        assert sender.recv(100).startswith(b"HTTP/1.1 200")
    assert len(reads) < 25


def test_who_owes_holds_up_nobody_else_on_a_proxy_s_connection():
    large = b"X: " + b"y" * 512 + b"\r\n"
    head = b"POST /caption HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: %s\r\nContent-Length: %d\r\n"
    with (
        serve(fake_engine, trusted_proxies=["127.0.0.1"]) as live,
        socket.create_connection(("127.0.0.1", live.port)) as proxy,
    ):
        proxy.settimeout(20)
        proxy.sendall(head % (b"1.2.3.4", len(png())) + large + b"\r\n" + png()[:-9])
        live.service.rates.pages._longest = 120.0  # seconds, beyond the test's patience
        live.service.rates.pages.spend("1.2.3.4", 400 + 100_000)
        for byte in png()[-9:]:  # the last one costs something
            time.sleep(0.05)
            proxy.sendall(bytes([byte]))
        assert b"200 OK" in proxy.recv(9999)
        proxy.sendall(head % (b"5.6.7.8", len(png())) + b"\r\n" + png())
        assert b"200 OK" in proxy.recv(9999)


def test_captions_that_are_known_cost_as_much_as_pages_while_others_are_here():
    """Answering takes a front-end as long, and they take no slot of the engine."""
    with serve(fake_engine, cache_mb=1, trusted_proxies=["127.0.0.1"]) as live:

        def seconds(client: str) -> float:
            start = time.perf_counter()
            assert live.caption(png(), X_Forwarded_For=client).status == 200
            return time.perf_counter() - start

        seconds("1.2.3.4")
        live.service.rates.pages.spend("1.2.3.4", 400 + 200)
        assert seconds("1.2.3.4") < 0.3, "nobody else is here"
        assert live.caption(png((3, 3, 3)), X_Forwarded_For="5.6.7.8").status == 200
        live.service.rates.pages.spend("1.2.3.4", 200)
        assert seconds("1.2.3.4") > 0.5
        assert live.metric("vignette_cache_hits_total") == 2


def test_the_ops_port_has_a_rate_for_all_clients_together():
    with serve(fake_engine) as live:
        buckets = make_ops_app(live.service).connections.pages
        waits = [buckets.spend(f"1.2.3.{n % 8}", 1) for n in range(8 * 200)]
    assert max(waits) > 1, "eight clients would have 200 a second each"


@pytest.mark.parametrize("asked", [
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X-Y: z\r\n" * 190,
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n",
    b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n",
    b"GET / HTTP/1.1\r\n" + b"X-Y: z\r\n" * 50,
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n",
    b"GET /\r\nHost: x\r\n",
    b"POST /caption?prompt=" + b"%41" * 5000 + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n",
])  # fmt: skip
def test_who_asks_and_leaves_is_charged(asked, monkeypatch):
    """Parsing a head takes as long as a page."""
    with serve(fake_engine) as live:
        live.service.rates.pages.spend = Mock(wraps=live.service.rates.pages.spend)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", live.port)) as client:
                client.sendall(asked + b"\r\n")
        cost = 1 + asked.count(b"\n") / 20 + len(asked) / 2**14
        charged = live.service.rates.pages.spend.call_args_list
        until(lambda: sum(call.args[1] for call in charged) >= 5 * cost)


@pytest.mark.parametrize("asked", [b"GET / HTTP/1.1\r\nHost: x\r\n", b"a: " + b"x" * 70_000])
def test_who_sends_a_part_of_a_head_or_too_much_of_one_is_charged(asked):
    with serve(fake_engine) as live:
        live.service.rates.pages.spend = Mock(wraps=live.service.rates.pages.spend)
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(asked)
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_WR)
                assert not client.recv(1)
        until(lambda: live.service.rates.pages.spend.called)
        live.service.rates.pages.spend.reset_mock()
        with socket.create_connection(("127.0.0.1", live.port)):
            pass  # as those do who ask whether the port is open
        assert live.request("GET", "/health/live").status == 200
        assert live.service.rates.pages.spend.call_count == 1


def test_connections_that_who_owes_has_left_are_not_read(monkeypatch):
    parsed = Mock(wraps=HTTPHeaders.parse)
    monkeypatch.setattr(HTTPHeaders, "parse", parsed)
    with serve(fake_engine) as live:
        live.service.rates.pages.spend("127.0.0.1", 400 + 200)
        for _ in range(100):
            with socket.create_connection(("127.0.0.1", live.port)) as client:
                client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert live.caption(png()).status == 200, "of the same address, but it stays"
        assert parsed.call_count < 50


@pytest.mark.parametrize(("clients", "each"), [(1, 0.01), (30, 0.1)])
def test_all_who_owe_together_are_read_as_slowly_as_a_few(clients, each, monkeypatch):
    loop = Mock()
    monkeypatch.setattr(held_connections.asyncio, "get_running_loop", lambda: loop)
    begin = Mock(side_effect=lambda connection, _: connection.close())
    held = held_connections.HeldConnections(Mock(owed=lambda _: 1), [], begin)
    with contextlib.ExitStack() as opened:
        for turn in range(2):
            for number in range(clients):
                ours, theirs = socket.socketpair()
                opened.enter_context(theirs)
                assert held.hold(ours, (f"1.2.3.{number}", turn), 1000)
        for wait, let_in, group in [call.args for call in loop.call_later.call_args_list]:
            assert wait <= each
            let_in(group)
        waits = [call.args[0] for call in loop.call_later.call_args_list]
        assert waits[-clients:] == pytest.approx([each] * clients)
        assert begin.call_count == clients, "one of each"
        held.close()


def test_a_trusted_proxy_s_connections_are_read_whoever_owes(monkeypatch):
    monkeypatch.setattr(held_connections, "_TURN_SECONDS", 100)
    with serve(fake_engine, trusted_proxies=("127.0.0.1",)) as live:
        live.service.rates.pages.spend("127.0.0.1", 400 + 200)
        assert live.caption(png(), X_Forwarded_For="1.2.3.4").status == 200


def test_another_port_for_operators_has_page_rates_of_its_own():
    with serve(fake_engine) as live:
        live.service.rates.pages.spend("127.0.0.1", 400 + 2000)
        start = time.perf_counter()
        assert fetch(live.ops_port, "GET", "/health/live").status == 200
        assert time.perf_counter() - start < 3


def test_large_pages_are_refused_to_who_asks_for_too_many_of_them(monkeypatch):
    monkeypatch.setattr(pages, "_PAGES_SECONDS", 0.5)
    asked = b"GET /static/swagger-ui/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve(fake_engine) as live, contextlib.ExitStack() as held:
        clients = [
            held.enter_context(socket.create_connection(("127.0.0.1", live.port)))
            for _ in range(30)
        ]
        for client in clients:  # connections of who owes would not be read
            client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(1000)
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
        live.service.rates.pages.spend("127.0.0.1", 400 + 100)
        start = time.perf_counter()
        assert live.request("OPTIONS", "/caption", Origin="https://a.example").status == 204
        assert time.perf_counter() - start > 0.3


def test_many_requests_at_once_delay_those_of_another_client_by_one():
    async def run() -> list[str]:
        turns, came = Turns(), []

        async def ask(client: str) -> None:
            await turns.take(client)
            came.append(client)

        tasks = [asyncio.ensure_future(ask(client)) for client in ["a"] * 100 + ["b"] * 2]
        await asyncio.sleep(0)
        tasks[1].cancel()  # it waits for the next turn
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        await turns.take("c")  # all were passed on
        return came

    came = asyncio.run(run())
    assert len(came) == 101
    assert sorted(place for place, client in enumerate(came) if client == "b")[1] <= 5
