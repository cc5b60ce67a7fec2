"""Logging never blocks, and shows nothing of a client's that looks like a line of ours."""

import contextlib
import json
import logging
import os
import threading

import pytest

from server.settings import Settings
from server.telemetry.logs import RateLimitedLog, configure, plain
from tests.support.fakes import fake_engine
from tests.support.live import png, serve, until


@pytest.fixture
def root_logging():
    before = logging.getLogger().handlers[:]
    yield
    logging.basicConfig(handlers=before, force=True)


def test_logging_never_blocks(root_logging, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr("server.telemetry.logs._FILE", write)
    configure(Settings(_env_file=None))

    def write_more_than_a_pipe_holds():
        for _ in range(5000):
            logging.getLogger("server.x").warning("x" * 1000)

    writing = threading.Thread(target=write_more_than_a_pipe_holds, daemon=True)
    writing.start()
    writing.join(60)
    assert not writing.is_alive(), "nobody reads the log, and its writer waits"
    os.set_blocking(read, False)
    said = bytearray()

    def is_told() -> bool:
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(read, 65536))
        logging.getLogger("server.x").warning("y")
        return b"lines were dropped" in said

    until(is_told)


def test_a_wrong_log_call_fails_nobody_and_is_told(root_logging, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr("server.telemetry.logs._FILE", write)
    configure(Settings(_env_file=None))
    logging.getLogger("server.x").warning("%d", "no number")
    assert b"test_logs.py:" in os.read(read, 65536)


def test_what_clients_sent_is_on_one_line_and_short():
    assert plain("a\nb\x85c\u2028d\x1b[0m\ud800", 100) == r"a\nb\x85c\u2028d\x1b[0m\ud800"
    assert len(plain("x" * 5000, 100)) == 101


def test_a_message_is_said_once_a_minute(caplog):
    now = [0.0]
    seldom = RateLimitedLog(logging.getLogger("server.x"), lambda: now[0])
    for now[0] in (0.0, 30.0, 61.0):
        seldom.warning("again %d", now[0])
    assert [r.getMessage() for r in caplog.records] == ["again 0", "again 61"]


def test_the_log_can_be_one_json_object_a_line(capfd):
    import logging

    from server.settings import Settings
    from server.telemetry.logs import configure, flush, request_id

    before = logging.getLogger().handlers[:]
    try:
        configure(Settings(_env_file=None, log_format="json"))
        token = request_id.set("abc")
        logging.getLogger("server.x").warning("a %s", "word")
        request_id.reset(token)
        flush()
        said = json.loads(capfd.readouterr().err)
    finally:
        logging.basicConfig(handlers=before, force=True)
    assert said["message"] == "a word"
    assert (said["level"], said["request_id"]) == ("WARNING", "abc")


def test_a_line_for_each_request_if_that_is_wished(caplog):
    caplog.set_level("INFO")
    for wished in (False, True):
        with serve(fake_engine, access_log=wished) as live:
            live.caption(b"no image", "?prompt=3", X_Request_Id="find-me")
        lines = [r.getMessage() for r in caplog.records if "find-me" in r.getMessage()]
        assert len(lines) == wished
    assert lines[0].startswith("POST /caption 400 ")


def test_what_the_engine_failed_on_is_logged_with_its_request(caplog):
    engine = fake_engine()
    with serve(lambda: engine) as live:
        live.caption(png())
        engine.runner.decode = None
        assert live.caption(png(), X_Request_Id="find-me").status == 500
    assert "request find-me: engine_failed" in caplog.text
