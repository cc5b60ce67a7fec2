"""Captions of files by a service elsewhere: all of them, through refusals and restarts."""

import contextlib
import itertools
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from runtime.planning.config import EngineConfig
from server.bulk.captioners import remote, service_client
from server.bulk.captioners.captioning import Captioning, CaptioningOptions, RunFailed
from server.bulk.captioners.remote import RemoteCaptioner
from server.bulk.captioners.service_client import RemoteService, ServiceFailed
from server.bulk.command import main
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts
from server.service import keys
from tests.support.fakes import fake_engine, gated
from tests.support.live import serve, small_images, until
from tests.support.web_servers import served

FAKE = {"model": "fake", "engine": "fake", "precision": "fake"}
SAID = {"caption": "a dog", "finish_reason": "stop", "score": -1.0, "engine": "fake fake"}


def said(files, prompt=None) -> dict:
    expected = fake_engine().generate([f.read_bytes() for f in files], [prompt] * len(files))
    return {file: caption.text for file, caption in zip(files, expected, strict=True)}


def outcomes_of(service, files, prompt=None, **sampling) -> dict:
    """By file: its caption, or why there is none."""
    with contextlib.closing(RemoteCaptioner(service, sampling)) as captioner:
        found = Captioning(captioner, CaptioningOptions(10**8), Kept()).run(
            items(parts(map(str, files), Columns(), 10**8), prompt=prompt)
        )
        outcomes = {each.item.id: each.error or each.captions[0].caption for each in found}
    return {file: outcomes[str(file)] for file in files}


def test_each_file_gets_its_caption(tmp_path):
    files = small_images(tmp_path, 40)
    files[7].write_bytes(b"GIF")
    with serve(lambda: fake_engine(EngineConfig(slots=4)), slots=4) as live:
        service = RemoteService.at(f"http://127.0.0.1:{live.port}/")
        assert (service.model, service.connections) == ("fake", 8)
        outcomes = outcomes_of(service, files, prompt="3", max_new_tokens=4)
    assert "not an image" in outcomes.pop(files[7])
    whole = [file for file in files[:40] if file != files[7]]
    expected = fake_engine().generate([f.read_bytes() for f in whole], ["3"] * 39, max_new_tokens=4)
    assert outcomes == {f: c.text for f, c in zip(whole, expected, strict=True)}


def test_a_service_with_its_health_on_another_port_is_known_all_the_same():
    with serve(fake_engine, ops_port=0) as live:
        assert live.request("GET", "/health/ready").status == 404
        service = RemoteService.at(f"http://127.0.0.1:{live.port}")
        assert service.identity == FAKE


def test_a_service_that_captions_with_another_engine_ends_the_run(tmp_path):
    """As when it was started anew: captions of two engines must not be mixed."""
    with serve(fake_engine) as live:
        service = RemoteService.at(f"http://127.0.0.1:{live.port}")
        live.model.identity = "another int8"
        with pytest.raises(RunFailed, match=r"another engine now \(another int8, before fake fake"):
            outcomes_of(service, small_images(tmp_path, 3))


def test_what_is_refused_for_now_is_sent_again(tmp_path):
    files, engine = small_images(tmp_path, 12), gated(slots=1)
    outcomes = {}
    with serve(lambda: engine, slots=1, max_queue=1) as live:
        engine.runner.open.clear()
        service = RemoteService(f"http://127.0.0.1:{live.port}", None, FAKE, 6)
        asking = threading.Thread(target=lambda: outcomes.update(outcomes_of(service, files)))
        asking.start()
        refused = 'vignette_requests_total{outcome="queue_full"}'
        until(lambda: live.metric(refused) >= 2)
        engine.runner.open.set()
        asking.join(60)
    assert outcomes == said(files)


def test_a_service_that_is_none_is_told(tmp_path):
    for url, complaint in (
        ("example.org", "no URL of a service"),
        ("http://127.0.0.1:1", "does not answer as a Vignette service"),
    ):
        with pytest.raises(ServiceFailed, match=complaint):
            RemoteService.at(url)


@pytest.mark.parametrize("answer", [{}, {"data": []}, {"data": [{"id": "gpt"}]}, [], "no JSON"])
def test_a_service_of_another_kind_is_told(answer):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            body = answer if isinstance(answer, str) else json.dumps(answer)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(ServiceFailed, match="does not answer as a Vignette service"):
            RemoteService.at(f"http://127.0.0.1:{server.server_port}")


def test_a_service_that_went_away_is_told_and_not_waited_for_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    service = RemoteService("http://127.0.0.1:1", None, FAKE, 2)
    with pytest.raises(RunFailed, match=r"for too long.*refused"):
        outcomes_of(service, small_images(tmp_path, 5))


def test_an_image_that_is_put_off_for_good_fails_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    files = small_images(tmp_path, 12)
    never = files[0].read_bytes()

    class Service(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            late = body == never
            time.sleep(0 if late else 0.1)
            answer = {"error": {"message": "busy"}} if late else SAID
            said = json.dumps(answer).encode()
            self.send_response(429 if late else 200)
            self.send_header("Content-Length", str(len(said)))
            self.send_header("Retry-After", "0.05")
            self.end_headers()
            self.wfile.write(said)

    with served(Service) as url:
        outcomes = outcomes_of(RemoteService(url, None, FAKE, 2), files)
    assert "gave no caption for too long: busy" in outcomes.pop(files[0])
    assert set(outcomes.values()) == {"a dog"}


def test_what_a_proxy_refuses_fails_alone_and_at_once(tmp_path):
    dates = itertools.cycle(["Fri, 31 Dec 1999 23:59:59 GMT", "Sun, 06 Nov 2022 9999999999:49 GMT"])

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(413)
            self.send_header("Retry-After", next(dates))
            self.end_headers()
            self.wfile.write(b"<html>")

    with served(Proxy) as url:
        files = small_images(tmp_path, 2)
        outcomes = outcomes_of(RemoteService(url, None, FAKE, 2), files)
    assert all("413 Request Entity Too Large" in outcome for outcome in outcomes.values())


def test_an_answer_to_nothing_is_not_taken_for_the_next_request_s():
    twice = threading.Event()

    class Stuttering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            said = json.dumps(self.rfile.read(1).decode()).encode()
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said)
            self.wfile.write(answer)
            first.wait(10)
            self.wfile.write(answer)
            twice.set()

    first = threading.Event()
    with served(Stuttering) as url, service_client.Connection(url, None) as connection:
        said = [connection.ask("POST", "/", b"a")[2]]
        first.set()
        assert twice.wait(10)
        said.append(connection.ask("POST", "/", b"b")[2])
    assert said == ["a", "b"]


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ("Content-Length: 1000000000000", b" " * 2**20),
        ("Retry-After: -1e9", b"[" * 100_000),
        ("Retry-After: nan", json.dumps(SAID | {"caption": None}).encode()),
        (
            "Retry-After: 0",
            json.dumps(SAID | {"caption": "\ud800"}).encode(),
        ),
        ("Retry-After: 0", b"[5]"),
    ],
)
def test_a_service_that_answers_nonsense_ends_the_run(headers, body, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.3)
    monkeypatch.setattr(service_client, "_MOST_BYTES", 2**21)

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode())
            with contextlib.suppress(OSError):  # who has read enough hangs up
                for _ in range(1 if len(body) < 2**20 else 8):
                    self.wfile.write(body)

    with served(Service) as url, pytest.raises(RunFailed, match="gave no caption for too long"):
        outcomes_of(RemoteService(url, None, FAKE, 2), small_images(tmp_path, 3))


def test_the_command_line_takes_a_service_and_its_key(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keys", "me"])
    assert keys.main() == 0
    made = capsys.readouterr()
    (tmp_path / "keys").write_text(made.out)
    files, output = small_images(tmp_path, 3), tmp_path / "captions.jsonl"
    with serve(fake_engine, api_keys=tmp_path / "keys") as live:
        arguments = [
            *map(str, files),
            "--url",
            f"http://127.0.0.1:{live.port}",
            "--output",
            str(output),
        ]
        assert main(arguments) == 1
        assert "send your key" in capsys.readouterr().err
        monkeypatch.setenv("VIGNETTE_API_KEY", made.err.rpartition(": ")[2].strip())
        assert main(arguments) == 0
        assert main(arguments) == 0
        assert "0 captioned, 3 before, 0 failed" in capsys.readouterr().err
    found = {
        line["id"]: line["caption"] for line in map(json.loads, output.read_text().splitlines())
    }
    assert found == {str(file): text for file, text in said(files).items()}


class _Slow(BaseHTTPRequestHandler):
    """Sends its head in single bytes, for ever; the head of a silent one, never."""

    pause = 0.05

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(OSError):
            while not self.over.wait(self.pause):
                self.wfile.write(b"H")


@contextlib.contextmanager
def slow(pause):
    over = threading.Event()
    with served(type("Slow", (_Slow,), {"pause": pause, "over": over})) as url:
        yield RemoteService(url, None, FAKE, 2)
        over.set()


def test_an_answer_in_single_bytes_ends_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PATIENCE", 0.5)
    monkeypatch.setattr(service_client, "_SECONDS", 0.5)
    with slow(0.05) as service, pytest.raises(RunFailed, match=r"for too long.*Timeout"):
        outcomes_of(service, small_images(tmp_path, 2))


def test_a_run_that_is_stopped_does_not_wait_for_a_silent_service(tmp_path):
    [image] = small_images(tmp_path, 1)
    with slow(600) as service, ThreadPoolExecutor(1) as pool:
        captioner = RemoteCaptioner(service, {})
        asked = pool.submit(captioner.caption, image.read_bytes(), None)
        until(lambda: captioner._all and captioner._all[0]._http.sock is not None)
        captioner.stop()
        with pytest.raises(RunFailed):
            asked.result(20)
        captioner.close()
