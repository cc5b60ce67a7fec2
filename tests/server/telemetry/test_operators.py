"""What operators and other people's clients expect: new keys, CORS, logs, proxies, messages."""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from unittest.mock import Mock

import pytest

from bench.contestants.servers import free_port
from bench.reliability.load import Clients, after
from bench.reliability.running import said, sample, service, wait_for
from server.addresses import address_of, networks
from server.refusals import QueueFull
from server.service.admission import Admission, State
from server.service.keys import Keys
from server.settings import InvalidSettings, from_command_line
from server.telemetry.logs import _Json
from tests.support.fakes import fake_engine, gated
from tests.support.live import JSON, as_json, b64, fetch, png, serve, until

ORIGIN = "https://example.org"


def line(name: str, key: str) -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()} 0 0\n"


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--port", "8000", "--ops-port", "8000"), "--ops-port 8000 is the port itself"),
        (("--slots", "1000000000"), "--slots: .*4096"),
        (("--decoders", "2000"), "--decoders: .*256"),
        (("--traces", "not-a-url"), "--traces: .*http"),
    ],
)
def test_a_setting_that_can_not_be_is_named_with_its_range(flags, message):
    with pytest.raises(InvalidSettings, match=message):
        from_command_line(list(flags))


def test_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("VIGNETTE_API_KEYS", "")
    with pytest.raises(InvalidSettings, match="VIGNETTE_API_KEYS is empty"):
        from_command_line([])


# --- Keys -----------------------------------------------------------------------------------------


def read_again(live, reading):
    async def read():
        live.service.key_reader.read(reading)
        await live.service.key_reader.task

    asyncio.run_coroutine_threadsafe(read(), live.loop).result(30)


def test_keys_are_read_again_and_a_wrong_file_changes_nothing(tmp_path, caplog, monkeypatch):
    file = tmp_path / "keys"
    file.write_text(line("one", "a"))

    with serve(fake_engine, api_keys=file) as live:
        assert live.caption(png(), X_API_Key="a").status == 200
        file.write_text(line("two", "b"))
        read_again(live, 1)
        assert live.caption(png(), X_API_Key="a").status == 401
        assert live.caption(png(), X_API_Key="b").status == 200
        file.write_text("nonsense\n")
        read_again(live, 2)
        assert live.caption(png(), X_API_Key="b").status == 200
        assert "stay as they were" in caplog.text
        with monkeypatch.context() as patched:
            full = Mock(side_effect=OSError("too many open files"))
            patched.setattr(live.service.key_reader, "_open", full)
            read_again(live, 3)
        assert live.caption(png(), X_API_Key="b").status == 200
        assert "stay as they were: too many open files" in caplog.text
        assert live.metric('vignette_key_requests_total{key="two",outcome="ok"}') == 3
    assert isinstance(live.service.keys, Keys)


def test_a_request_that_has_begun_is_judged_by_the_keys_of_then(tmp_path):
    file = tmp_path / "keys"
    file.write_text(line("one", "a"))
    body = as_json(images=[b64(png())] * 2)
    head = "POST /caption HTTP/1.1\r\nHost: x\r\nX-API-Key: a\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        serve(fake_engine, api_keys=file) as live,
        socket.create_connection(("127.0.0.1", live.port)) as client,
    ):
        client.sendall(head.encode() + body[:10])
        until(lambda: live.service.budget.held)
        file.write_text(line("two", "b"))
        read_again(live, 1)
        client.sendall(body[10:])
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b'"caption"') == 2


def test_sighup_reads_the_keys_and_loses_no_request(tmp_path):
    file = tmp_path / "keys"
    file.write_text(line("one", "a"))
    with service("--api-keys", str(file)) as it:

        async def run():
            clients = Clients(it.url)
            clients.headers["X-API-Key"] = "a"
            loop = asyncio.create_task(clients.closed_loop(sample(), 8, after(1.5)))
            for count in range(5):
                file.write_text(line("one", "a") + line(f"n{count}", "b"))
                it.process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.2)
            return await loop

        answers = asyncio.run(run())
        assert answers and all(a.caption == said() for a in answers)
        wait_for(lambda: "read again: 2 API keys" in it.log(), 10, it.log)
        request = urllib.request.Request(
            f"{it.url}/caption", sample(), {"X-API-Key": "b", "Content-Type": "image/png"}
        )
        assert urllib.request.urlopen(request, timeout=30).status == 200


# --- Other origins, proxies, logs -----------------------------------------------------------------


def test_no_other_origin_may_use_it_unless_that_is_wished():
    with serve(fake_engine) as live:
        reply = live.caption(png(), Origin=ORIGIN)
        assert "Access-Control-Allow-Origin" not in reply.headers
        assert live.request("OPTIONS", "/caption", Origin=ORIGIN).status == 405


def test_a_page_of_an_origin_that_is_named_may_use_it():
    with serve(fake_engine, cors_origins=(ORIGIN,)) as live:
        asked = {"Origin": ORIGIN, "Access_Control_Request_Method": "POST",
                 "Access_Control_Request_Headers": "content-type, x-api-key"}  # fmt: skip
        preflight = live.request("OPTIONS", "/caption", **asked)
        assert preflight.status == 204
        assert preflight.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
        assert "X-API-Key" in preflight.headers["Access-Control-Allow-Headers"]
        for reply in (live.caption(png(), Origin=ORIGIN), live.caption(b"?", Origin=ORIGIN)):
            assert reply.headers["Access-Control-Allow-Origin"] == ORIGIN
            assert reply.headers["Vary"] == "Origin"
        other = live.caption(png(), Origin="https://evil.example")
        assert "Access-Control-Allow-Origin" not in other.headers


def test_an_origin_is_not_echoed_where_all_are_let_in():
    with serve(fake_engine, cors_origins=("*",)) as live:
        reply = live.caption(png(), Origin="https://" + "x" * 10_000)
        assert reply.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("peer", "said_by_it", "address"),
    [
        ("10.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "1.1.1.1, 203.0.113.9, 10.0.0.2", "203.0.113.9"),
        ("192.0.2.1", "203.0.113.9", "192.0.2.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9:5555", "203.0.113.9"),
        ("10.0.0.1", "[2001:db8::1]:443", "2001:db8::1"),
        ("10.0.0.1", "::ffff:203.0.113.9", "203.0.113.9"),
        ("10.0.0.1", "", "10.0.0.1"),
    ],
)
def test_only_proxies_that_are_named_are_believed(peer, said_by_it, address):
    assert address_of(peer, said_by_it, networks(("10.0.0.0/8",))) == address
    assert address_of(peer, said_by_it, []) == peer


def test_an_access_log_has_fields(caplog, tmp_path):
    caplog.set_level("INFO")
    (tmp_path / "keys").write_text(line("one", "a"))
    settings = {"access_log": True, "trusted_proxies": ("127.0.0.1",)}
    with serve(fake_engine, api_keys=tmp_path / "keys", **settings) as live:
        live.caption(png(), X_API_Key="a", X_Forwarded_For="203.0.113.9", X_Request_Id="r1")
        live.caption(b"?", X_API_Key="a")
        live.caption(png())
    lines = [json.loads(_Json().format(r)) for r in caplog.records if hasattr(r, "fields")]
    assert [(x["code"], x["status"], x["key"]) for x in lines] == [
        ("ok", 200, "one"), ("invalid_image", 400, "one"), ("unauthorised", 401, None),
    ]  # fmt: skip
    first = lines[0]
    assert (first["client"], first["request_id"]) == ("203.0.113.9", "r1")
    assert (first["method"], first["path"], first["model"]) == ("POST", "/caption", "fake")
    assert first["duration_ms"] > 0


# --- The queue ------------------------------------------------------------------------------------


def test_a_request_that_can_not_be_in_time_is_refused_at_once():
    now = [0.0]
    admission = Admission(256, 30.0, lambda: now[0])
    admission.state, admission.slots = State.READY, 2
    admission.expect(0.1)
    entered = [admission.enter() for _ in range(40)]
    for place in entered:
        place.__enter__()
    with pytest.raises(QueueFull) as full:
        admission.check_in_time(2.0)
    assert full.value.retry_after == 4
    admission.check_in_time(10.0)


def test_a_fresh_server_knows_how_long_its_queue_takes():
    engine = gated(slots=1)
    with serve(lambda: engine, slots=1) as live:
        live.model.admission.expect(1.0)
        engine.runner.open.clear()
        with contextlib.ExitStack() as others:
            for _ in range(4):
                others.enter_context(live.model.admission.enter("127.0.0.1"))
            reply = live.caption(png(), "?timeout_ms=2000")
        assert (reply.status, reply.error) == (429, "queue_full")
        assert int(reply.headers["Retry-After"]) == 4
        engine.runner.open.set()


# --- Messages -------------------------------------------------------------------------------------


def test_messages_say_what_to_do():
    with serve(fake_engine) as live:
        packed = live.caption(png(), Content_Encoding="gzip")
        assert (packed.status, packed.error) == (415, "unsupported_media_type")
        assert "send the body as it is" in packed.json["error"]["message"]
        form = live.caption(b"image=abc", Content_Type="application/x-www-form-urlencoded")
        assert "curl -F image=@FILE" in form.json["error"]["message"]
        twice = live.caption(png(), "?prompt=3&prompt=4")
        assert "given 2 times" in twice.json["error"]["message"]


def test_base64_may_be_broken_into_lines_and_unpadded():
    with serve(fake_engine) as live:
        expected = live.caption(png()).json["caption"]
        lines = base64.encodebytes(png()).decode()
        for text in (lines, lines.replace("\n", "\r\n"), b64(png()).rstrip("=")):
            assert live.caption(as_json(image=text), **JSON).json["caption"] == expected


def test_a_body_far_over_the_limit_still_gets_its_answer():
    with serve(fake_engine, max_body_bytes=1_000_000) as live:
        reply = live.caption(b"x" * 6_000_000)
        assert (reply.status, reply.error) == (413, "body_too_large")


def test_stopping_does_not_wait_for_a_worker_that_is_stopped():
    with service() as it:
        os.kill(it.worker_pid(), signal.SIGSTOP)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(20) == 0


def test_files_of_the_same_names_in_the_working_directory_are_not_ours(tmp_path):
    for name in ("server", "runtime", "vignette"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')")
    port = free_port()
    for command in ("serve", "caption"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "vignette", command, "--help"], cwd=tmp_path,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and "usage" in done.stdout
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "vignette", "serve", "--port", str(port)],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for(lambda: _answers(port), 60)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0


@pytest.mark.parametrize("second", ["SIGTERM", "SIGINT"])
def test_a_second_signal_of_any_kind_ends_it_at_once(second):
    code = f"""
import asyncio, os, signal
from server.processes.local import stop_event

async def main():
    stop = stop_event(None)
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.wait()
    os.kill(os.getpid(), signal.{second})
    await asyncio.sleep(20)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    assert done.returncode == -signal.Signals[second]


def _answers(port: int) -> bool:
    try:
        return fetch(port, "GET", "/health/ready").status == 200
    except OSError:
        time.sleep(0.1)
        return False
