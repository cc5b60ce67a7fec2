"""What one connection may not do to the others, and what it may expect."""

import asyncio
import contextlib
import hashlib
import select
import socket
import struct
import threading
import time

import pytest

from server.fairness.token_buckets import TokenBuckets
from server.http import client_stream, handler
from server.http.loop import few_at_a_time
from server.service.service import Service
from tests.support.fakes import fake_engine
from tests.support.live import fetch, png, serve, until


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Shorten the server's time-outs."""
    monkeypatch.setattr(client_stream, "_HANG_UP_SECONDS", 0.05)
    monkeypatch.setattr(handler, "_UNREAD_SECONDS", 0.1)


@pytest.mark.parametrize("path", ["/caption", "/health/live"])
def test_a_body_of_single_bytes_is_hung_up_on(path):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                client.sendall(head.encode() + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n")
                assert client.recv(100) == b""
        until(lambda: live.service.budget.held == 0)
        chunks = iter([png()[:20], png()[20:]])
        assert live.caption(chunks).status == 200


@pytest.mark.parametrize("head", [{}, {"Expect": "100-continue"}])
def test_a_stranger_is_refused_before_the_body_is_kept_however_often(tmp_path, head):
    (tmp_path / "keys").write_text(f"one {hashlib.sha256(b'secret').hexdigest()} 0 0\n")
    with serve(fake_engine, api_keys=tmp_path / "keys") as live:
        live.service.rates.refusals.spend("127.0.0.1", 120)  # no refusals left: it has to wait
        reply = live.caption(png(), **head)
        assert (reply.status, reply.error) == (401, "unauthorised")
        assert live.metric('vignette_requests_total{outcome="ok"}') == 0
        assert live.caption(png(), X_API_Key="secret").status == 200


def test_an_answer_that_is_not_read_counts_and_is_given_up():
    with serve(fake_engine, body_seconds=1.0) as live:
        live.service.metrics.render = lambda: b"x" * 30_000_000
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: live.service.budget.held == 30_000_000)
            until(lambda: live.service.budget.held == 0)
            with contextlib.suppress(ConnectionError):
                while client.recv(2**20):
                    pass


def test_idle_connections_make_room_for_new_ones():
    with serve(fake_engine, max_connections=16) as live:
        idle = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(40)]
        for _ in range(3):
            assert live.caption(png()).status == 200
        closed = 0
        for client in idle:
            client.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                closed += client.recv(1) == b""
            client.close()
        assert 24 <= closed <= 30


def test_a_request_keeps_its_connection_whoever_comes():
    from tests.support.fakes import gated

    engine = gated()
    with serve(lambda: engine, max_connections=16) as live:
        engine.runner.open.clear()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(live.caption(png())))
        asking.start()
        until(lambda: live.model.admission.inside)
        crowd = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(60)]
        time.sleep(0.2)
        engine.runner.open.set()
        asking.join(30)
        assert answers[0].status == 200
        for client in crowd:
            client.close()


def test_bodies_that_stop_before_their_end_make_room_for_others():
    """Many addresses together could hold all bytes, each half of what the others left."""
    size = 9_000_000
    with serve(fake_engine, max_queue_bytes=4 * size) as live, contextlib.ExitStack() as held:
        live.service.budget._most = size  # the setting's own bounds are larger
        head = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        left, stopped = size, []
        while left > 20:
            source = f"127.0.1.{len(stopped) + 1}", 0
            client = held.enter_context(
                socket.create_connection(("127.0.0.1", live.port), source_address=source)
            )
            body = left // 2
            client.sendall(head % (body + 1) + bytes(body))
            left -= body
            stopped.append(client)
            until(lambda left=left: size - live.service.budget.held == left)
        assert live.caption(png()).error == "queue_full"
        time.sleep(1.2)
        assert live.caption(png()).status == 200
        assert select.select(stopped, [], [], 5)[0] == stopped[:1]
        assert stopped[0].recv(1) == b""


def test_a_server_without_files_left_pauses_and_says_so_once(monkeypatch, caplog):
    with serve(fake_engine) as live:
        real, failures = socket.socket.accept, []

        def accept(sock):
            if len(failures) < 3:
                failures.append(1)
                raise OSError(24, "Too many open files")
            return real(sock)

        monkeypatch.setattr(socket.socket, "accept", accept)
        assert live.caption(png()).status == 200
    assert len(failures) == 3
    assert caplog.text.count("Too many open files") == 1


def test_a_connection_may_send_any_number_of_requests_in_chunks():
    asked = b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    asked += b"1\r\nx\r\n1\r\ny\r\n0\r\n\r\n"
    with serve(fake_engine) as live, socket.create_connection(("127.0.0.1", live.port)) as client:
        client.settimeout(20)
        answers = client.makefile("rb")
        for _ in range(150):
            client.sendall(asked)
            assert answers.readline().startswith(b"HTTP/1.1 200")
            while answers.readline() != b"\r\n":
                pass
            answers.readline()


def test_a_client_that_says_no_more_after_its_last_chunk_still_gets_its_answer():
    with serve(fake_engine) as live:
        head = b"POST /caption HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        whole = head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        whole %= len(png()), png()
        for last in (1, 2, 4, 5, 7, 100):
            with socket.create_connection(("127.0.0.1", live.port)) as client:
                client.sendall(whole[:-last])
                time.sleep(0.05)
                client.sendall(whole[-last:])
                client.shutdown(socket.SHUT_WR)
                client.settimeout(10)
                assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pause", [0.0, 0.1])
def test_a_client_that_says_no_more_still_gets_its_answer(pause):
    """Also if the end comes along with the body."""
    with serve(fake_engine) as live:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", live.port)) as client:
                head = f"Host: x\r\nConnection: close\r\nContent-Length: {len(png())}\r\n\r\n"
                client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode())
                time.sleep(pause)
                client.sendall(png())
                client.shutdown(socket.SHUT_WR)
                client.settimeout(10)
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode() + png()[:-1])
            client.shutdown(socket.SHUT_WR)
            client.settimeout(10)
            assert client.recv(100) == b"", "a part of a body is none"
        assert fetch(live.port, "GET", "/health/live").status == 200


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    "announced",
    [
        b"HTTP/1.0\r\n",
        b"HTTP/1.1\r\nConnection: Close, TE\r\n",
        b"HTTP/1.1\r\nConnection: TE\r\nConnection: close\r\n",
    ],
)
def test_a_last_request_is_announced_in_several_ways(announced, ends):
    """The connection ends after it, and a client that says no more gets its answer."""
    length = b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(png())
    with serve(fake_engine) as live, socket.create_connection(("127.0.0.1", live.port)) as client:
        client.settimeout(10)
        client.sendall(b"POST /caption " + announced + length + png())
        if ends:
            client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"}\n")


def test_a_stream_to_a_client_that_knows_no_chunks_has_an_end():
    head = b"POST /caption?stream=true HTTP/1.0\r\nConnection: keep-alive\r\n"
    head += b"Content-Length: %d\r\n\r\n"
    with serve(fake_engine) as live, socket.create_connection(("127.0.0.1", live.port)) as client:
        client.settimeout(10)
        client.sendall(head % len(png()) + png())
        assert b"caption" in b"".join(iter(lambda: client.recv(65536), b""))


def test_requests_sent_ahead_are_not_answered_once_their_client_has_gone(monkeypatch):
    """Thousands fit into what has been read."""
    refused, refuse = [], handler.Handler.send_error

    def send_error(self, *args, **options):
        refused.append(args)
        refuse(self, *args, **options)

    monkeypatch.setattr(handler.Handler, "send_error", send_error)
    with serve(fake_engine) as live:
        client = socket.create_connection(("127.0.0.1", live.port))
        client.sendall(b"PROPFIND / HTTP/1.1\r\nHost: x\r\n\r\n" * 5000)
        assert client.recv(1000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        for _ in range(20):
            assert fetch(live.port, "GET", "/health/live").status == 200
    assert 0 < len(refused) < 1000


def test_connections_that_wait_for_a_refusal_make_room():
    with serve(fake_engine, max_connections=16) as live:
        live.service.rates.refusals = TokenBuckets(50.0, 100.0, longest=1.0)
        live.service.rates.refusals.spend("127.0.0.1", 300)
        waiting = []
        for _ in range(16):
            client = socket.create_connection(("127.0.0.1", live.port))
            client.sendall(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
            waiting.append(client)
        until(lambda: len(live.app.connections.late) >= 14)
        for _ in range(4):
            assert live.caption(png()).status == 200
        for client in waiting:
            client.close()
        until(lambda: not live.app.connections.late)


def test_a_client_without_credit_that_leaves_gets_its_place_back(tmp_path):
    from tests.support.fakes import gated

    (tmp_path / "keys").write_text(f"one {hashlib.sha256(b'secret').hexdigest()} 0 1\n")
    engine = gated()
    with serve(lambda: engine, api_keys=tmp_path / "keys") as live:
        engine.runner.open.clear()
        live.service.rates.refusals.spend("one", 150)
        head = f"Host: x\r\nX-API-Key: secret\r\nContent-Length: {len(png())}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode() + png())
            until(lambda: live.model.admission.inside)
        until(lambda: not live.model.admission.inside)
        engine.runner.open.set()
        until(lambda: live.caption(png(), X_API_Key="secret").status == 200)
        assert not live.app.connections.late


@pytest.mark.parametrize(
    ("query", "lines"),
    [
        (b"", b"a:\r\n" * 3000),
        (b"?" + b"a&" * 3000, b""),
        (b"?" + b"%41" * 400, b""),
        (b"/caption?" + b"%41" * 400, b""),
        (b"/" + b"%C3%A9" * 300, b""),
        (b"", b"a: " + b"x" * 20_000 + b"\r\n"),
        (b"", b"hOST :" + b":" * 400 + b"\r\n"),
        (b"", b"host: a\r\n" + (b" " + b":" * 90 + b"\r\n") * 4),
    ],
)
def test_a_head_that_takes_long_to_parse_is_hung_up_on(query, lines):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            start = b"GET /health/live" + query + b" HTTP/1.1\r\nHost: x\r\n"
            client.sendall(start + lines + b"\r\n")
            assert client.makefile("rb").read().startswith(b"HTTP/1.1 431 ")
        assert live.request("GET", "/health/live").status == 200


def test_who_asks_and_leaves_all_the_time_has_to_wait():
    from tests.support.fakes import gated

    engine = gated()
    with serve(lambda: engine) as live:
        live.service.rates.abandoned = TokenBuckets(0.01, 3)
        engine.runner.open.clear()
        head = b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png())
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", live.port)) as client:
                client.sendall(head + png())
                until(lambda: live.model.admission.inside)
            until(lambda: not live.model.admission.inside)
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(head + png())
            until(lambda: live.app.connections.late)
            assert not live.model.admission.inside
        engine.runner.open.set()


def test_nothing_is_begun_for_who_is_hung_up_on(monkeypatch):
    begun: list[str] = []
    monkeypatch.setattr(handler, "_LATE", 0)
    monkeypatch.setattr(Service, "check_room", lambda service, client: begun.append(client))
    with serve(fake_engine) as live:
        live.service.rates.abandoned = TokenBuckets(0.01, 1)
        live.service.rates.abandoned.spend("127.0.0.1", 2)
        with pytest.raises(ConnectionError):
            live.caption(png())
        live.service.rates.abandoned = TokenBuckets(1, 1)
        assert live.caption(png()).status == 200
    assert len(begun) == 1


@pytest.mark.parametrize("length", ["+3", "1_0", "-1", "3, 4"])
def test_a_length_that_is_no_number_is_told_so(length):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            head = f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nabc"
            client.sendall(head.encode())
            assert client.recv(12) == b"HTTP/1.1 400"
        assert live.caption(png()).status == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [("http://x:80/health/live", 200), ("HTTPS://x/health/live?a=/", 200), ("http://x?a", 200),
     ("http://x/nope", 404), ("ftp://x/health/live", 404)],
)  # fmt: skip
def test_a_target_may_name_scheme_and_host(target, status):
    with (
        serve(fake_engine) as live,
        socket.create_connection(("127.0.0.1", live.port)) as client,
    ):
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(12) == f"HTTP/1.1 {status}".encode()


def test_headers_of_many_parts_are_not_read_to_their_end():
    accept = ",".join(["text/html"] * 120) + ",text/plain"
    with serve(fake_engine) as live:
        assert live.caption(png(), Accept=accept).headers["Content-Type"].startswith("application")
        assert live.request("GET", "/", If_None_Match='""' + "*" * 15_000).status == 200


def test_connections_that_leave_their_answers_unread_make_room():
    with serve(fake_engine, max_connections=16, body_seconds=60.0) as live:
        live.service.metrics.render = lambda: b"x" * 8_000_000
        unread = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(16)]
        for client in unread:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: len(live.app.connections.unread) >= 15)
        assert live.caption(png()).status == 200
        for client in unread:
            client.close()


def test_answers_without_a_body_that_are_not_read_are_noticed_too():
    with serve(fake_engine, cors_origins=("*",)) as live, socket.socket() as client:
        live.app.connections.pages = TokenBuckets(1e9, 1e9)
        name = b"X-Request-Id: " + b"x" * 128 + b"\r\n"
        asked = b"OPTIONS /caption HTTP/1.1\r\nHost: x\r\nOrigin: a\r\n" + name + b"\r\n"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", live.port))
        client.settimeout(0.2)

        def is_unread() -> bool:
            with contextlib.suppress(TimeoutError):
                client.send(asked * 200)
            return bool(live.app.connections.unread)

        until(is_unread, 120)


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="elsewhere asyncio's own loop is used")
def test_timers_come_between_thousands_of_busy_connections():
    async def run() -> tuple[list[int], set[int]]:
        loop, turns, seen = asyncio.get_running_loop(), [], set()
        pairs = [socket.socketpair() for _ in range(300)]
        busy = 0

        def readable(number: int) -> None:
            nonlocal busy
            busy += 1
            seen.add(number)

        for number, (ours, theirs) in enumerate(pairs):
            theirs.send(b"x")
            loop.add_reader(ours, readable, number)
        for _ in range(40):
            before = busy
            await asyncio.sleep(0)
            turns.append(busy - before)
        for ours, theirs in pairs:
            loop.remove_reader(ours)
            ours.close()
            theirs.close()
        return turns, seen

    with asyncio.Runner(loop_factory=few_at_a_time) as runner:
        turns, seen = runner.run(run())
    assert max(turns) <= 64, "asyncio's own loop takes up all at once"
    assert len(seen) == 300, "everybody has a turn"
