"""Systems that are not Linux on x86: what they lack is hidden, and the service works without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.contestants.servers import free_port
from bench.reliability.running import said, sample, wait_for
from runtime.planning import machine
from tests.support.live import fetch
from tests.support.paths import DEMO, ROOT

HIDING = """
import ctypes, io, os, resource, builtins

for name in ("posix_fallocate", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("RLIMIT_AS", "prlimit"):
    if hasattr(resource, name):
        delattr(resource, name)

class NoPrctl(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = NoPrctl
HIDDEN = ("/proc", "/dev/shm", "/sys")

def hiding(real, absent):
    def call(path, *args, **kwargs):
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(HIDDEN):
            return absent(path)
        return real(path, *args, **kwargs)
    return call

def gone(path):
    raise FileNotFoundError(2, "hidden", str(path))

os.access = hiding(os.access, lambda path: False)
os.stat = hiding(os.stat, gone)
builtins.open = io.open = hiding(builtins.open, gone)
"""


@pytest.fixture
def elsewhere(tmp_path):
    """The environment of a process in which everything specific to Linux is hidden."""
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}


def test_a_server_captions_without_what_only_linux_has(elsewhere, tmp_path):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--engine", str(DEMO), "--port", str(port)],
        env=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip

    def ready():
        assert process.poll() is None, process.communicate()[0]
        try:
            return fetch(port, "GET", "/health/ready").status == 200
        except OSError:
            return False

    try:
        wait_for(ready, 60)
        assert any(path.name.startswith("vignette-run-") for path in tmp_path.iterdir())
        reply = fetch(port, "POST", "/caption", sample(), Content_Type="image/png")
        assert reply.json["caption"] == said()
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in out
    assert not any(path.name.startswith("vignette-run-") for path in tmp_path.iterdir())


def test_its_processes_end_with_it(elsewhere):
    program = (
        "import multiprocessing, os, time\n"
        "from server.system import follow_parent\n"
        "def child(pipe):\n"
        "    follow_parent(); pipe.send(os.getpid()); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    ours, theirs = multiprocessing.Pipe()\n"
        "    multiprocessing.get_context('fork').Process(target=child, args=(theirs,)).start()\n"
        "    print(ours.recv(), flush=True)\n"
        "    os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=elsewhere, capture_output=True, text=True, check=True
    )
    child = int(done.stdout)
    wait_for(lambda: not Path(f"/proc/{child}").exists(), 10)


def test_files_are_captioned_without_what_only_linux_has(elsewhere, tmp_path):
    output = tmp_path / "captions.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "vignette", "caption", str(ROOT / "demo/samples/owl.png"),
         "--engine", str(DEMO), "--output", str(output)], env=elsewhere,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said() in output.read_text()


@pytest.mark.parametrize(
    ("features", "fast"),
    [
        ("Features\t: fp asimd asimddp i8mm", True),  # ARM
        ("Features\t: fp asimd", False),
        ("flags\t\t: sse4_2 avx avx2", True),  # x86
        ("flags\t\t: sse4_2 avx", False),
    ],
)
def test_instructions_tell_whether_8_bits_are_fast(features, fast, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nBogoMIPS\t: 50.00\n{features}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(machine, "_CPUINFO", info)
    machine.this_machine.cache_clear()
    try:
        assert machine.this_machine().has_fast_int8 is fast
    finally:
        machine.this_machine.cache_clear()


def test_apples_processors_have_dot_products(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "none")
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    machine.this_machine.cache_clear()
    try:
        assert machine.this_machine().has_int8_dot
    finally:
        monkeypatch.undo()
        machine.this_machine.cache_clear()
