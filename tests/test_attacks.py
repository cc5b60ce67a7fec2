"""What one request or one client may not do to the others: bodies, answers, connections, logs."""

import asyncio
import contextlib
import hashlib
import io
import logging
import os
import socket
import struct
import threading
import time
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InvalidImage, InvalidRequest
from runtime.manifest import Preprocessing
from runtime.preprocess import FORMATS
from server import heads
from server.admission import Admission, QueueFull, State
from server.bodies import Parts, json_parts, media_type, read_form
from server.cost import estimate
from server.fetching import is_public
from server.intake import Intake
from server.logs import Seldom, configure, plain
from server.metrics import Metrics, count_as, forget_gauges, make_files
from server.ports import CannotListen, Ports
from server.refusals import Refusals
from server.remembered import Remembered
from server.settings import Settings
from server.shared import NoSharedMemory, PixelStore, RunFolder
from tests.conftest import SAMPLES
from tests.fakes import fake_engine
from tests.live import as_json, b64, fetch, png, serve, until

JSON = {"Content_Type": "application/json"}


# --- Bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "multipart/form-data; boundary=x" + "-" * 60_000,
        "multipart/form-data; boundary=" + "x" * 71,
        "multipart/form-data; boundary=",
        "multipart/form-data",
        'multipart/form-data; a="' + ";" * 65_000,
    ],
)
def test_a_content_type_is_bounded_before_it_is_parsed(header):
    with pytest.raises(InvalidRequest, match="Content-Type"):
        media_type(header)


def test_a_form_is_read_in_pieces_and_has_few_parts():
    part = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n%s\r\n'
    form = part % (b"\r\n-" * 200_000) + b"--b--\r\n"
    found = Parts()
    assert len(list(read_form(form, "b", found))) > 5
    assert found.images == [b"\r\n-" * 200_000]
    with pytest.raises(InvalidRequest, match="multipart"):
        list(read_form(part % b"x" * 100 + b"--b--\r\n", "b", Parts()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{%s}" % b",".join(b'"%d":1' % n for n in range(100_000)), "too large without its image"),
        (b'{"image": [%s"x"]}' % (b'"x",' * 100_000), "too large without its image"),
        (b'{"a": %s1%s}' % (b"[" * 20, b"]" * 20), "nested"),
        (b'{"a": %s}' % (b" " * 20_000), "too large without its image"),
        (b'{"prompt": "%s"}' % (b"x" * 20_000), "more than 16 KiB"),
        (b'{"%s": 1}' % (b"x" * 20_000), "more than 16 KiB"),
        (b'{"image": "%s"}' % (b"\xf0\x9f\x98\x80" * 20_000), "not base64"),
        (b'{"image": "\\u0000 99"}', "not base64"),
        (b'{"image": "%s"}' % (b"\\u0041" * 20_000), "not base64"),
        (b'{"image": "%s"}' % (b'\\"' * 20_000), "too large without its image"),
        (b'{"image": "%s' % (b"x" * 20_000), "too large without its image"),
    ],
)
def test_json_is_bounded_before_it_is_built(body, message):
    with pytest.raises(InvalidRequest, match=message):
        json_parts(body)


def test_a_large_image_in_json_may_be_written_as_clients_do():
    image = os.urandom(60_000)
    written = b64(image)
    php = written.replace("/", r"\/")
    dotnet = written.replace("+", r"\u002B")
    for text in (written, php, dotnet, "data:image/png;base64," + written):
        parts = json_parts(b'{"prompt": "3 4", "image": "%s"}' % text.encode())
        assert parts == Parts({"prompt": "3 4"}, [image])
    assert Parts.unpacked(Parts({"a": 1}, [image, b""]).packed()) == Parts({"a": 1}, [image, b""])


def test_nothing_that_a_client_sends_comes_back_in_full():
    with serve(fake_engine, max_body_bytes=2_000_000) as live:
        name = "\x7f" * 4_000
        replies = [
            live.caption(as_json(image=b64(png()), **{name: 1}), **JSON),
            live.caption(png(), f"?{name}=1".replace("\x7f", "%7F")),
            live.caption(png(), Content_Type="text/" + "x" * 400),
            live.caption(as_json(image=b64(png()), max_new_tokens=10**4000), **JSON),
        ]
    assert all(400 <= r.status < 500 and len(r.body) < 1000 for r in replies)


def test_a_large_json_body_is_taken_apart_elsewhere_and_captioned():
    with serve(fake_engine) as live:
        padded = png() + bytes(200_000)
        reply = live.caption(as_json(image=b64(padded), prompt="3"), **JSON)
        assert reply.json["caption"] == live.caption(png(), "?prompt=3").json["caption"]
        until(lambda: live.service.admission.held_bytes == 0)


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x"])
def test_a_content_length_that_is_none_is_the_clients_fault(length):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(
                f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\nx".encode()
            )
            assert client.recv(100).split()[1].startswith(b"4")
        assert live.caption(png()).status == 200


@pytest.mark.parametrize("path", ["/caption", "/health/live"])
def test_a_body_of_single_bytes_is_hung_up_on(path):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            with contextlib.suppress(ConnectionError):
                client.sendall(head.encode() + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n")
                assert client.recv(100) == b""
        until(lambda: live.service.admission.held_bytes == 0)
        chunks = iter([png()[:20], png()[20:]])
        assert live.caption(chunks).status == 200


def test_bodies_are_not_parsed_where_none_is_wanted():
    kind = "multipart/form-data; boundary=x" + "-" * 10_000
    with serve(fake_engine) as live:
        assert live.request("POST", "/", b"-" * 60_000, Content_Type=kind).status == 405
        assert live.request("POST", "/nope", b"-" * 60_000, Content_Type=kind).status == 404


@pytest.mark.parametrize("head", [{}, {"Expect": "100-continue"}])
def test_a_stranger_is_refused_before_the_body_is_kept_however_often(tmp_path, head):
    (tmp_path / "keys").write_text(f"one {hashlib.sha256(b'secret').hexdigest()} 0 0\n")
    with serve(fake_engine, api_keys=tmp_path / "keys") as live:
        live.service.refusals._change("127.0.0.1", -120.0)  # it has to wait for its refusals
        reply = live.caption(png(), **head)
        assert (reply.status, reply.error) == (401, "unauthorised")
        assert live.metric('vignette_requests_total{outcome="ok"}') == 0
        assert live.caption(png(), X_API_Key="secret").status == 200


def test_who_sends_nothing_but_errors_waits_for_them_and_nobody_else():
    now = [0.0]
    refusals = Refusals(lambda: now[0])
    assert not any(refusals.wait("bad") for _ in range(100))
    assert 0 < refusals.wait("bad") < refusals.wait("bad") < 0.1
    assert refusals.wait("good") == 0
    for _ in range(1000):
        refusals.wait("bad")
    assert refusals.wait("bad") == 5.0
    now[0] += 60
    assert refusals.wait("bad") == 0
    for _ in range(200):
        refusals.served("served")
        assert refusals.wait("served") == 0


def test_large_bodies_come_in_no_faster_than_they_may():
    async def run():
        intake = Intake(rate=50e6, burst=1e6)
        loop = asyncio.get_running_loop()
        assert intake.take(100_000, 100_000) is None, "most images are as small"
        start = loop.time()
        for received in range(1_000_000, 11_000_000, 1_000_000):
            if (wait := intake.take(received, 1_000_000)) is not None:
                await wait
        return loop.time() - start

    assert asyncio.run(run()) > 0.1, "ten megabytes at fifty a second, less what is at once"


def test_digests_are_remembered_for_a_while():
    now = [0.0]
    kept = Remembered(10.0, lambda: now[0])
    until = kept.add("a")
    assert "a" in kept and kept.items() == {"a": until} and not kept.expired("a")
    now[0] = 11.0
    assert "a" not in kept and kept.items() == {} and kept.expired("a")
    assert not kept.expired("a")
    for n in range(3000):
        kept.add(str(n))
    assert len(kept.items()) == 1024


# --- Answers and connections ----------------------------------------------------------------------


def test_an_answer_that_is_not_read_counts_and_is_given_up():
    with serve(fake_engine, body_seconds=1.0) as live:
        live.service.metrics.render = lambda: b"x" * 30_000_000
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: live.service.admission.held_bytes == 30_000_000)
            until(lambda: live.service.admission.held_bytes == 0)
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
    from tests.fakes import gated

    engine = gated()
    with serve(lambda: engine, max_connections=16) as live:
        engine.runner.open.clear()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(live.caption(png())))
        asking.start()
        until(lambda: live.service.admission.inside)
        crowd = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(60)]
        time.sleep(0.2)
        engine.runner.open.set()
        asking.join(30)
        assert answers[0].status == 200
        for client in crowd:
            client.close()


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


# --- Logs -----------------------------------------------------------------------------------------


@pytest.fixture
def root_logging():
    before = logging.getLogger().handlers[:]
    yield
    logging.basicConfig(handlers=before, force=True)


def test_logging_never_blocks(root_logging, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setattr("server.logs._FILE", write)
    configure(Settings(_env_file=None))
    for _ in range(5000):
        logging.getLogger("server.x").warning("x" * 1000)
    said = b""
    while b"lines were dropped" not in said:
        said += os.read(read, 65536)
        logging.getLogger("server.x").warning("y")


def test_what_clients_sent_is_on_one_line_and_short():
    assert plain("a\nb\x85c\u2028d\x1b[0m\ud800", 100) == r"a\nb\x85c\u2028d\x1b[0m\ud800"
    assert len(plain("x" * 5000, 100)) == 101


def test_a_message_is_said_once_a_minute(caplog):
    now = [0.0]
    seldom = Seldom(logging.getLogger("server.x"), lambda: now[0])
    for now[0] in (0.0, 30.0, 61.0):
        seldom.warning("again %d", now[0])
    assert [r.getMessage() for r in caplog.records] == ["again 0", "again 61"]


# --- Ports, folders, memory -----------------------------------------------------------------------


def test_a_port_is_taken_from_the_first_moment(tmp_path):
    first = Ports(Settings(_env_file=None, port=0))
    number = first.number
    try:
        with pytest.raises(CannotListen, match="choose another with --port"):
            Ports(Settings(_env_file=None, port=number))
    finally:
        first.close()
    Ports(Settings(_env_file=None, port=number)).close()


def test_a_host_that_is_none_is_named():
    for host in ("no.such.host.invalid", "192.0.2.1"):
        with pytest.raises(CannotListen, match="--host"):
            Ports(Settings(_env_file=None, port=0, host=host))


def test_a_run_keeps_its_folder_whoever_starts(monkeypatch, tmp_path):
    first, second = RunFolder(), RunFolder()
    assert first.path.exists() and second.path.exists()
    os.close(first._lock)  # it dies
    third = RunFolder()
    assert not first.path.exists() and second.path.exists()
    second.remove()
    third.remove()


def test_metrics_have_their_room_from_the_start(tmp_path, monkeypatch):
    from prometheus_client import values

    before = values.ValueClass
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "to be restored")
    try:
        make_files(tmp_path / "m", ["front-0"])
        sizes = {path.name: path.stat() for path in (tmp_path / "m").iterdir()}
        assert all(s.st_blocks * 512 >= s.st_size == 64 * 1024 for s in sizes.values())
        for life in (1, 2):
            count_as("front-0")
            metrics = Metrics()
            metrics.requests.labels("ok").inc()
            metrics.inside.set(5)
            assert f'vignette_requests_total{{outcome="ok"}} {life}.0' in metrics.render().decode()
            assert "vignette_requests_inside 5.0" in metrics.render().decode()
            forget_gauges("front-0")
            assert "vignette_requests_inside 5.0" not in metrics.render().decode()
        assert {path.name for path in (tmp_path / "m").iterdir()} == set(sizes)
    finally:
        values.ValueClass = before


def test_full_shared_memory_is_a_message(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "to be restored")
    with pytest.raises(NoSharedMemory, match="MiB of metrics"):
        make_files(tmp_path / "m", ["front-0"])
    with pytest.raises(NoSharedMemory, match="--shm-size"):
        PixelStore(tmp_path / "p", 4, (3, 8, 8), create=True)


@pytest.mark.parametrize(
    "address", ["::ffff:0:127.0.0.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "::127.0.0.1"]
)
def test_private_addresses_in_disguise_are_not_public(address):
    assert not is_public(address)


def test_a_client_that_says_no_more_still_gets_its_answer():
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            head = f"Host: x\r\nConnection: close\r\nContent-Length: {len(png())}\r\n\r\n"
            client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode() + png())
            client.shutdown(socket.SHUT_WR)
            client.settimeout(10)
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert fetch(live.port, "GET", "/health/live").status == 200


# --- What a second attack found -------------------------------------------------------------------


def test_short_strings_of_json_are_bounded_together():
    pair = b'"%s":"%s"' % (b"\x7f" * 15_900, b"\x7f" * 15_900)
    with pytest.raises(InvalidRequest, match="too large without its image"):
        json_parts(b"{%s}" % b",".join([pair] * 3))


@dataclass(frozen=True)
class Slow:
    client: str
    number: int


def test_who_waits_for_a_decoder_keeps_nobody_from_the_engine():
    now = [0.0]
    admission = Admission(16, 10**9, 30.0, lambda: now[0])
    admission.state, admission.slots = State.READY, 2
    with contextlib.ExitStack() as held:
        for number in range(16):
            held.enter_context(admission.enter())
            held.enter_context(admission.aside(Slow("bad", number)))
        assert admission.inside == 0
        with admission.enter(), pytest.raises(QueueFull):
            held.enter_context(admission.aside(Slow("bad", 99)))
        for number in range(16):
            held.enter_context(admission.enter())
            held.enter_context(admission.aside(Slow("good", number)))
        for _ in range(20):  # one now and then: the time between them is no time that one takes
            now[0] += 10
            with admission.enter():
                admission.check_in_time(1.0)
        assert admission.inside == 0
    assert admission.inside == 0


def test_a_client_holds_at_most_half_of_the_bytes():
    admission = Admission(16, 1000, 30.0)
    admission.hold(500, "bad")
    with pytest.raises(QueueFull):
        admission.hold(1, "bad")
    admission.hold(500, "good")
    admission.let_go(500, "bad")
    admission.let_go(500, "good")
    assert admission.held_bytes == 0 and not admission._bytes


def test_connections_that_wait_for_a_refusal_make_room():
    with serve(fake_engine, max_connections=16) as live:
        live.service.refusals._change("127.0.0.1", -300.0)
        waiting = []
        for _ in range(16):
            client = socket.create_connection(("127.0.0.1", live.port))
            client.sendall(b"GET /nope HTTP/1.1\r\nHost: x\r\n\r\n")
            waiting.append(client)
        until(lambda: len(live.service.late) >= 14)
        for _ in range(4):
            assert live.caption(png()).status == 200
        for client in waiting:
            client.close()
        until(lambda: not live.service.late)


def test_a_client_without_credit_that_leaves_gets_its_place_back(tmp_path):
    from tests.fakes import gated

    (tmp_path / "keys").write_text(f"one {hashlib.sha256(b'secret').hexdigest()} 0 1\n")
    engine = gated()
    with serve(lambda: engine, api_keys=tmp_path / "keys") as live:
        engine.runner.open.clear()
        live.service.refusals._change("one", -150.0)
        head = f"Host: x\r\nX-API-Key: secret\r\nContent-Length: {len(png())}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode() + png())
            until(lambda: live.service.admission.inside)
        until(lambda: not live.service.admission.inside)
        engine.runner.open.set()
        until(lambda: live.caption(png(), X_API_Key="secret").status == 200)
        assert not live.service.late


@pytest.mark.parametrize(("query", "lines"), [(b"", b"a:\r\n" * 3000), (b"?" + b"a&" * 3000, b"")])
def test_a_head_of_thousands_of_parts_is_hung_up_on(query, lines):
    with serve(fake_engine) as live:
        with socket.create_connection(("127.0.0.1", live.port)) as client:
            start = b"GET /health/live" + query + b" HTTP/1.1\r\nHost: x\r\n"
            client.sendall(start + lines + b"\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(100) == b""
        assert live.request("GET", "/health/live").status == 200


def _saved(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG, GIF = _saved("JPEG"), _saved("PNG"), _saved("GIF")
TABLE = 13 + (3 << ((GIF[10] & 7) + 1) if GIF[10] & 0x80 else 0)  # behind the colours
CHUNK = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))


@pytest.mark.parametrize(
    "image",
    [
        JPEG[:2] + b"\xff\xed\x00\x02" * 50_000 + JPEG[2:],
        JPEG[:2] + b"\xff" * 100_000 + JPEG[2:],
        PNG[:33] + CHUNK * 50_000 + PNG[33:],
        GIF[:TABLE] + b"\x21\xfe\x01a\x00" * 50_000 + GIF[TABLE:],
        GIF[:TABLE] + b"\x21\xfe" + b"\x01a" * 50_000 + b"\x00" + GIF[TABLE:],
    ],
)
def test_an_image_of_thousands_of_parts_is_refused_unopened(image):
    with pytest.raises(InvalidImage, match="parts"):
        heads.check(image)


def test_images_as_programs_write_them_have_few_parts():
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    for kind in FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        heads.check(buffer.getvalue())
    for path in SAMPLES.glob("*.png"):
        heads.check(path.read_bytes())
    heads.check(JPEG[:20])
    heads.check(b"")


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [("PNG", (1, 990), {}), ("TIFF", (16, 16), {"tiffinfo": {322: 4000, 323: 4000}})],
)
def test_what_a_small_image_becomes_is_estimated_too(kind, size, options):
    how = Preprocessing(224, 224, 3)
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    if options:
        image.tag_v2[322] = image.tag_v2[323] = 4000
        with pytest.raises(InvalidImage, match="tiles far larger"):
            estimate(image, buffer.getvalue(), how)
        image.tag_v2[322] = image.tag_v2[323] = 1000
    assert estimate(image, buffer.getvalue(), how).seconds > 0.015
