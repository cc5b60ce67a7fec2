"""The README's own blocks work as pasted, and what it promises about itself holds."""

import json
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT, SAMPLES
from tests.support.processes import ON_CPU, running

README = (ROOT / "README.md").read_text()
SAID = json.loads((SAMPLES / "captions.json").read_text())


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def bash(script: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_requests_caption_the_samples():
    [requests] = [block for block in blocks("sh") if "curl" in block]
    with running(*ON_CPU) as (_, port, _):
        said = bash(requests.replace("localhost:8000", f"localhost:{port}"))
    for name in ("owl.png", "eagle-shark.png", "donuts.png"):
        assert SAID[name]["caption"] in said
    assert said.endswith("two\n")


def test_the_commands_exist():
    commands = [
        line.partition("#")[0].strip()
        for block in (*blocks("sh"), *blocks("console"))
        for line in block.splitlines()
        if line.startswith("make ")
    ]
    assert "make serve" in commands
    assert "make test" in commands
    for command in commands:
        bash(command.replace("make ", "make --dry-run ", 1))
    listed = bash("make help")
    for target in re.findall(r"make ([a-z_-]+)", README):
        assert re.search(rf"^{target}\s", listed, re.MULTILINE), target


def test_the_python_example_runs():
    [example] = blocks("python")
    said = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [SAID["owl.png"]["caption"]]


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_it_stays_short():
    assert len(README.splitlines()) <= 120
