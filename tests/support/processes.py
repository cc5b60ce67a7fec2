"""The service as processes, with the demo engine, on a port of its own."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.paths import DEMO, ROOT, SAMPLES

SAID = json.loads((SAMPLES / "captions.json").read_text())
MODEL = "vignette-demo"
ON_CPU = ("--provider", "cpu")


def start(*arguments: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "server", "--engine", str(DEMO), *arguments],
        cwd=ROOT, env=os.environ | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@contextmanager
def running(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen, int, str]]:
    process = start("--port", "0", *arguments, **variables)
    said = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if found := re.search(r"curl .*localhost:(\d+)/caption", line):
                yield process, int(found[1]), said
                return
        pytest.fail(f"the server ended: {said}")
    finally:
        process.kill()
        process.communicate(timeout=30)
