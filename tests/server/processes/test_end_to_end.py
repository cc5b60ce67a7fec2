"""The server as a process, with the demo engine, over a real socket."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from tests.support.live import Reply, fetch, multipart
from tests.support.paths import DEMO, ROOT, SAMPLES
from tests.support.processes import MODEL, ON_CPU, SAID, running, start


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(*ON_CPU) as (_, port, _):
        yield port


def test_three_scenes_in_all_three_forms(port):
    for name in ("owl.png", "eagle-shark.png", "donuts.png"):
        image = (SAMPLES / name).read_bytes()
        form, kind = multipart(image=image)
        as_json = json.dumps({"image": base64.b64encode(image).decode()}).encode()
        replies = [
            fetch(port, "POST", "/caption", image),
            fetch(port, "POST", "/caption", form, Content_Type=kind),
            fetch(port, "POST", "/caption", as_json, Content_Type="application/json"),
        ]
        assert [r.json["caption"] for r in replies] == [SAID[name]["caption"]] * 3


def test_a_question_is_answered(port):
    image = (SAMPLES / "eagle-shark.png").read_bytes()
    reply = fetch(port, "POST", "/caption?prompt=what+is+above+the+shark", image)
    assert reply.json["caption"] == "eagle"


def test_32_clients_at_once_get_the_right_captions(port):
    names = [name for name in SAID for _ in range(8)]
    with ThreadPoolExecutor(32) as pool:
        replies = pool.map(
            lambda name: fetch(port, "POST", "/caption", (SAMPLES / name).read_bytes()), names
        )
        assert [r.json["caption"] for r in replies] == [SAID[n]["caption"] for n in names]


def test_sigterm_finishes_what_was_accepted_and_exits_0():
    image = (SAMPLES / "owl.png").read_bytes()

    def inside() -> int:
        lines = fetch(port, "GET", "/metrics").body.decode().splitlines()
        counts = dict(line.rpartition(" ")[::2] for line in lines if not line.startswith("#"))
        return int(float(counts.get(f'vignette_requests_inside{{model="{MODEL}"}}', 0)))

    with running(*ON_CPU, "--slots", "1") as (process, port, _), ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(fetch, port, "POST", "/caption", image) for _ in range(40)]
        while inside() < 20:
            assert not all(f.done() for f in asked), "the requests were over before the signal"
        finished = sum(f.done() for f in asked)  # first: what ends meanwhile counts once
        time.sleep(0.2)  # until what has ended is not counted as inside any more
        accepted = finished + inside()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        replies = [f.result() for f in asked if f.exception() is None]
        captions = [r.json["caption"] for r in replies if r.status == 200]
        assert {r.status for r in replies} <= {200, 503}
        assert len(captions) >= accepted
        assert set(captions) == {SAID["owl.png"]["caption"]}


def test_several_workers_share_the_work_and_stand_in_for_each_other():
    image = (SAMPLES / "owl.png").read_bytes()
    flags = (*ON_CPU, "--workers", "2", "--front-ends", "2")
    with running(*flags) as (_, port, _), ThreadPoolExecutor(8) as pool:

        def workers() -> list[dict]:
            return fetch(port, "GET", "/health/ready").json["workers"]

        def all_ready() -> bool:
            return [w["state"] for w in workers()] == ["ready", "ready"]

        end = time.monotonic() + 30
        while not all_ready():
            assert time.monotonic() < end
            time.sleep(0.05)
        before = [w["pid"] for w in workers()]
        asked = [pool.submit(fetch, port, "POST", "/caption", image) for _ in range(64)]
        os.kill(before[0], signal.SIGKILL)
        assert fetch(port, "GET", "/health/ready").status == 200, "the other one serves"
        assert {f.result().json["caption"] for f in asked} == {SAID["owl.png"]["caption"]}
        while not all_ready():
            assert time.monotonic() < end
            time.sleep(0.05)
        after = workers()
        assert after[0]["pid"] != before[0]
        assert after[1]["pid"] == before[1]
        assert [w["restarts"] for w in after] == [1, 0]
        lines = fetch(port, "GET", "/metrics").body.decode().splitlines()
        assert f'vignette_worker_restarts{{model="{MODEL}",worker="0"}} 1.0' in lines


def test_two_models_are_served_side_by_side_with_one_killed(small):
    _, folder = small
    image = (SAMPLES / "owl.png").read_bytes()

    def ask(model: str = "") -> Reply:
        return fetch(port, "POST", f"/caption{model and '?model='}{model}", image)

    with running(*ON_CPU, "--engine", f"{DEMO} other={folder}") as (_, port, said):
        assert f"model {MODEL}, " in said and "model other, " in said
        expected = SAID["owl.png"]["caption"]
        first, named, other = ask(), ask(MODEL), ask("other")
        assert (first.json["caption"], first.json["model"]) == (expected, MODEL)
        assert named.json["caption"] == expected
        assert other.json["model"] == "other"
        unknown = ask("none")
        assert (unknown.status, unknown.error) == (404, "unknown_model")
        assert f"{MODEL}, other" in unknown.json["error"]["message"]

        ready = fetch(port, "GET", "/health/ready").json
        assert ready["models"] == {MODEL: "ready", "other": "ready"}
        pids = {worker["model"]: worker["pid"] for worker in ready["workers"]}
        os.kill(pids["other"], signal.SIGKILL)
        assert ask().json["caption"] == expected
        assert fetch(port, "GET", "/health/ready").status == 200
        assert ask("other").json["caption"] == other.json["caption"], "it waited for the next life"
        after = fetch(port, "GET", "/health/ready").json["workers"]
        assert {w["model"]: w["restarts"] for w in after} == {MODEL: 0, "other": 1}
        lines = fetch(port, "GET", "/metrics").body.decode().splitlines()
        assert 'vignette_requests_total{model="other",outcome="ok"} 2.0' in lines


def _front_end(server: int, worker: int) -> int:
    """Process id of the only front-end: the server's other child beside the worker."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    [found] = [
        int(pid) for pid in children
        if int(pid) != worker and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]  # fmt: skip
    return found


def test_processes_that_start_again_serve_what_the_service_started_with(tmp_path):
    """Not what an export, or a broken file of keys, has put in its place meanwhile."""
    image, folder, keys = (SAMPLES / "owl.png").read_bytes(), tmp_path / "engine", tmp_path / "keys"
    shutil.copytree(DEMO, folder)
    keys.write_text(f"me {sha256(b'mine').hexdigest()} 0 0\n")

    def ask() -> Reply:
        return fetch(port, "POST", "/caption", image, X_API_Key="mine")

    def ask_until_it_answers() -> Reply:
        end = time.monotonic() + 60
        while True:
            with suppress(OSError):
                if (reply := ask()).status == 200:
                    return reply
            assert time.monotonic() < end
            time.sleep(0.1)

    flags = ("--engine", str(folder), "--api-keys", str(keys), "--timeout-seconds", "4")
    with running(*ON_CPU, *flags) as (process, port, _):
        expected = SAID["owl.png"]["caption"]
        assert ask().json["caption"] == expected
        manifest = folder / "manifest.json"
        first = manifest.read_text()
        other = json.loads(first)
        other["files"]["tokenizer.json.new"] = sha256(b"").hexdigest()
        (folder / "tokenizer.json.new").touch()
        manifest.write_text(json.dumps(other))
        keys.write_text("no keys at all\n")
        [worker] = fetch(port, "GET", "/health/ready").json["workers"]
        os.kill(_front_end(process.pid, worker["pid"]), signal.SIGKILL)
        assert ask_until_it_answers().json["caption"] == expected
        os.kill(worker["pid"], signal.SIGKILL)
        assert ask().status in (503, 504), "no worker takes the other engine"
        manifest.write_text(first)
        end = time.monotonic() + 60
        while (found := ask()).status != 200:
            assert time.monotonic() < end
        assert found.json["caption"] == expected
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert "another engine than the service or the run started with" in said


def test_an_engine_whose_files_are_written_to_serves_no_more_until_they_are_whole(tmp_path):
    """They are mapped: what it says would change."""
    image, folder = (SAMPLES / "owl.png").read_bytes(), tmp_path / "engine"
    shutil.copytree(DEMO, folder)
    flags = ("--engine", str(folder), "--timeout-seconds", "3")
    with running(*ON_CPU, *flags) as (process, port, _):
        expected = fetch(port, "POST", "/caption", image).json["caption"]
        weights = folder / "weights.data"
        whole = weights.read_bytes()
        with weights.open("r+b") as stream:
            stream.write(bytes(4096))
        end = time.monotonic() + 60
        while fetch(port, "GET", "/health/ready").status == 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert fetch(port, "POST", "/caption", image).status in (503, 504)
        weights.write_bytes(whole)
        while (found := fetch(port, "POST", "/caption", image)).status != 200:
            assert time.monotonic() < end
        assert found.json["caption"] == expected
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert "weights.data was written to while it was in use" in said
    assert "weights.data is damaged" in said


def test_a_worker_that_dies_while_the_server_drains_is_replaced():
    image = (SAMPLES / "owl.png").read_bytes()
    with running(*ON_CPU, "--slots", "1") as (process, port, _), ThreadPoolExecutor(20) as pool:
        [worker] = fetch(port, "GET", "/health/ready").json["workers"]
        os.kill(worker["pid"], signal.SIGSTOP)  # so that nothing is finished before it dies
        asked = [pool.submit(fetch, port, "POST", "/caption", image) for _ in range(20)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        os.kill(worker["pid"], signal.SIGKILL)
        replies = [future.result() for future in asked]
        assert {r.json["caption"] for r in replies} == {SAID["owl.png"]["caption"]}
        assert process.wait(30) == 0


def test_a_server_that_is_told_to_stop_while_it_starts_stops():
    process = start("--port", "0", *ON_CPU)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert "is ready" not in said


def test_settings_come_from_flags_and_variables():
    image = (SAMPLES / "owl.png").read_bytes()
    variables = {"VIGNETTE_PROVIDER": "cpu", "VIGNETTE_MAX_BODY_BYTES": str(len(image))}
    with running("--text-tokens", "8", **variables) as (_, port, said):
        assert re.search(r"encoder \S+ on cpu", said)
        assert fetch(port, "POST", "/caption", image + b"x").status == 413
        assert (
            "use 1 to 8"
            in fetch(port, "POST", "/caption?max_new_tokens=9", image).json["error"]["message"]
        )
        assert (
            fetch(port, "POST", "/caption?max_new_tokens=8", image).json["caption"]
            == SAID["owl.png"]["caption"]
        )
    help_command = [sys.executable, "-m", "server", "--help"]
    shown = subprocess.run(help_command, cwd=ROOT, capture_output=True, text=True, check=True)
    for flag in ("--engine", "--port", "--provider", "--slots", "--max-queue", "--max-pixels"):
        assert flag in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engine", "engines/none"), "engines/none is not an engine"),
        (("--provider", "gpu"), "unknown provider 'gpu'"),
        (("--precision", "int2/int2/int2"), "has no combination int2/int2/int2: use one of fp32/"),
        (("--slots", "0"), "--slots: "),
        (("--slots", "many"), "(got 'many')"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is no address of this machine"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments, message):
    process = start("--port", "0", *arguments)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert message in said
    assert "Traceback" not in said


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said, _ = start("--port", port).communicate(timeout=30)
        assert f"can't listen on 127.0.0.1:{port}" in said
        assert "--port" in said
