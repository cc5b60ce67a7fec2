"""A server process as a user would start it, observed from outside."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from bench.common.processes import family, pss
from bench.contestants.servers import free_port

DEMO, LARGE = Path("engines/demo"), Path("engines/random-git-base")
_SAMPLES = Path("demo/samples")
_READY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """A scenario's result: a figure for people, and whether the promise holds.

    passed: None if it could not be tried here. in_time: whether the promised seconds and rates
    hold, which a busy machine can spoil; short runs ignore it. engine: folder of the engine that
    was used.
    """

    figure: str
    passed: bool | None
    in_time: bool = True
    engine: Path = DEMO


def command(port: int, *flags: str, engine: Path = DEMO, program: str = "server") -> list[str]:
    """Command line that starts a server on a port. program: the module to run."""
    return [sys.executable, "-m", program, "--engine", str(engine), "--port", str(port), *flags]


class Service:
    """A server process on a free port."""

    def __init__(self, *flags: str, engine: Path = DEMO, program: str = "server") -> None:
        self.port = free_port()
        handle, self._log = tempfile.mkstemp(prefix="vignette-log-")
        given = ("--provider", "cpu", *flags)
        self.process = subprocess.Popen(
            command(self.port, *given, engine=engine, program=program), stdout=handle, stderr=handle
        )
        os.close(handle)
        self.url = f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """The process's output so far."""
        return Path(self._log).read_text()

    def ready(self) -> dict[str, Any] | None:
        """Content of /health/ready, or None unless it answers 200."""
        status, body = get(self.port, "/health/ready")
        return json.loads(body) if status == 200 else None

    def wait_ready(self) -> None:
        """Wait up to a minute until the service is ready."""
        wait_for(self.ready, _READY_SECONDS, self.log)

    def worker_pid(self) -> int:
        """Process id of the first worker."""
        found = wait_for(self.ready, _READY_SECONDS, self.log)
        return int(found["workers"][0]["pid"])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        families = text_string_to_metric_families(get(self.port, "/metrics")[1].decode())
        samples = (sample for family in families for sample in family.samples)
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )

    def resident(self) -> int:
        """PSS of all its processes in bytes: shared pages count once."""
        return sum(pss(pid) for pid in family(self.process.pid))

    def close(self) -> int:
        """Stop the process with SIGTERM; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            Path(self._log).unlink()


@contextlib.contextmanager
def service(*flags: str, engine: Path = DEMO, program: str = "server") -> Iterator[Service]:
    """A server that is ready, stopped on exit. program: the module to run.

    Raises RuntimeError if it does not end with status 0.
    """
    started = Service(*flags, engine=engine, program=program)
    try:
        started.wait_ready()
        yield started
    except BaseException:
        started.close()
        raise
    log = started.log()
    if (status := started.close()) != 0:
        raise RuntimeError(f"the server ended with status {status}: {log[-2000:]}")


def wait_for(condition: Callable[[], Any], seconds: float, log: Callable[[], str] = str) -> Any:
    """The first true value of `condition`. Raises RuntimeError, with the log, after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds} s in vain: {log()[-2000:]}")
        time.sleep(0.02)
    return found


def get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body of a GET; status 0 without an answer."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
    except OSError:
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split()
    return (int(words[1]) if len(words) > 1 else 0), body


def sample(name: str = "owl.png") -> bytes:
    """A committed sample image."""
    return (_SAMPLES / name).read_bytes()


def said(name: str = "owl.png") -> str:
    """The expected caption of a sample."""
    return json.loads((_SAMPLES / "captions.json").read_text())[name]["caption"]
