"""The servers to compare, each started as its users would start it."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from bench.common.settings import TOKENS, Settings

PICTURE = "picture.jpg"  # which `picture` writes
_START_SECONDS = 180
_STOP_SECONDS = 20


class ServerFailed(RuntimeError):
    """A contestant did not start, or gave a wrong answer."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """`command`: Python's arguments, with {port}; `json_body`: send the image as base64 JSON.

    tokens: new tokens that captions must have, so that all do equal work; None: any number.
    """

    name: str
    command: tuple[str, ...]
    path: str = "/caption"
    json_body: bool = False
    tokens: int | None = TOKENS

    def body(self, image: bytes) -> tuple[bytes, str]:
        """Request body and content type for an image."""
        if not self.json_body:
            return image, "image/jpeg"
        return json.dumps({"image": base64.b64encode(image).decode()}).encode(), "application/json"


def baselines(settings: Settings) -> list[Contestant]:
    """PyTorch servers in all precisions."""
    kinds = (
        ("PyTorch, one at a time", "bench.contestants.single", False),
        ("PyTorch, micro-batched", "bench.contestants.batched", False),
        ("LitServe", "bench.contestants.litserve_app", True),
    )
    return [
        Contestant(f"{name}, {precision}", ("-m", module, "{port}", precision), json_body=encoded)
        for name, module, encoded in kinds
        for precision in settings.precisions
    ]


def vignette(settings: Settings, *flags: str) -> Contestant:
    """The service itself, as `make serve` starts it."""
    command = ("-m", "server", "--engine", str(settings.engine), "--port", "{port}", *flags)
    return Contestant("Vignette", command, path=f"/caption?max_new_tokens={TOKENS}")


def in_process(settings: Settings) -> Contestant:
    """Vignette's engine and an HTTP server in one process."""
    command = ("-m", "bench.contestants.in_process", "{port}", str(settings.engine))
    return Contestant("one process", command)


@contextlib.contextmanager
def running(contestant: Contestant, image: bytes) -> Iterator[str]:
    """Start a server; its URL, once it has answered. Raises ServerFailed if it never does."""
    port = free_port()
    command = [sys.executable, *(part.format(port=port) for part in contestant.command)]
    url = f"http://127.0.0.1:{port}{contestant.path}"
    with tempfile.TemporaryFile("w+") as log:
        # Its own process group: LitServe's workers outlive their parent when it is killed.
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_until_it_answers(server, contestant, url, image)
            yield url
        except ServerFailed as failure:
            log.seek(0)
            raise ServerFailed(f"{failure}: {log.read()[-500:].strip()}") from None
        finally:
            _stop(server)


def free_port() -> int:
    """A free TCP port on localhost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_it_answers(
    server: subprocess.Popen[bytes], contestant: Contestant, url: str, image: bytes
) -> None:
    deadline, reason = time.monotonic() + _START_SECONDS, "not asked yet"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerFailed(f"{contestant.name} ended with {server.returncode}")
        try:
            answer = ask(contestant, url, image)
        except (OSError, HTTPException, ValueError) as cause:
            reason = str(cause)
            time.sleep(0.2)
            continue
        words = len(answer["caption"].split())  # with random weights, each word is one token
        if contestant.tokens not in (None, words):
            raise ServerFailed(
                f"{contestant.name} did not generate {contestant.tokens} tokens: {answer}"
            )
        return
    raise ServerFailed(f"{contestant.name} did not answer in {_START_SECONDS} s: {reason}")


def ask(contestant: Contestant, url: str, image: bytes) -> dict:
    """Send one request; return its answer, parsed from JSON."""
    body, content_type = contestant.body(image)
    request = urllib.request.Request(url, body, {"Content-Type": content_type})
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as response:
        return json.load(response)


def _stop(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)


def picture(folder: Path) -> bytes:
    """A synthetic 640x480 JPEG, the same at every call; also written to `folder`."""
    import io

    import numpy as np
    from PIL import Image

    blocks = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    (folder / PICTURE).write_bytes(buffer.getvalue())
    return buffer.getvalue()
