"""The Makefile's commands with paths as people have them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import DEMO, ROOT, SAMPLES

ODD = "my 'photos' $HOME"


@pytest.fixture
def make(tmp_path):
    """Runs a target with this interpreter in place of make's own environments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ready").touch()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # A make that runs the tests must not pass its own flags on.
        ours = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
        environment = {k: v for k, v in os.environ.items() if k not in ours}
        environment["PYTHONPATH"] = str(ROOT)
        program = [
            f"SERVE={sys.executable}",
            f"DEV={sys.executable}",
            f"SERVE_READY={folder}/ready",
            f"BULK_READY={folder}/ready",
        ]
        command = ["make", *arguments, *program, f"EXPORT_PYTHON={sys.executable}"]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_paths_may_hold_blanks_quotes_and_dollars(make, tmp_path):
    odd = tmp_path / ODD
    odd.mkdir()
    shutil.copytree(DEMO, odd / "engine")
    shutil.copy(SAMPLES / "owl.png", odd / "an owl.png")
    paths = {"ENGINE": "engine", "IMAGES": "an owl.png", "OUTPUT": "the captions.jsonl"}
    given = [f"{name}={odd / path}".replace("$", "$$") for name, path in paths.items()]
    done = make("caption", *given)
    assert done.returncode == 0, done.stderr
    assert "an owl on a purple background" in (odd / "the captions.jsonl").read_text()


def test_an_engine_is_named_for_its_checkpoint(make):
    folder = f"/no/such/{ODD}/"
    done = make("export", "MODEL=" + folder.replace("$", "$$"))
    assert done.returncode != 0
    assert folder.rstrip("/") in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not Path(ROOT / "engines" / ODD).exists()
