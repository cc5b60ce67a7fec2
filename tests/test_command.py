"""`vignette COMMAND`: what there is, what each takes, and what is missing."""

import subprocess
import sys

import pytest

import vignette
from runtime.planning.config import demo_engine
from tests.support.paths import DEMO, ROOT


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "vignette", *arguments], capture_output=True, text=True,
        check=False, cwd=ROOT, **options,
    )  # fmt: skip


def test_it_says_what_there_is():
    for arguments in ((), ("--help",)):
        said = run(*arguments)
        assert said.returncode == 0
        assert all(f"  {name} " in said.stdout for name in vignette.COMMANDS)
    wrong = run("serv")
    assert wrong.returncode == 2 and "no command 'serv'" in wrong.stderr
    assert "serve" in wrong.stderr


@pytest.mark.parametrize("name", vignette.COMMANDS)
def test_each_command_tells_what_it_takes(name):
    said = run(name, "--help")
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"usage: vignette {name}")


def test_what_is_missing_is_named_with_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(vignette, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["vignette", "export", "demo/model"])
    assert vignette.main() == 2
    said = capsys.readouterr().err
    assert "onnxruntime, torch, optimum" in said and "[export,cpu]" in said


def test_the_embedded_engine_is_found_from_anywhere(tmp_path, monkeypatch):
    assert (ROOT / demo_engine()).samefile(DEMO)
    monkeypatch.chdir(tmp_path)
    assert demo_engine().samefile(DEMO)
