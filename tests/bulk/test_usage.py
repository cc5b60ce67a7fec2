"""What can't be meant is told before anything is opened, and an interrupt is no error."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import pytest

import vignette
from server.bulk import command
from server.bulk.command import main
from server.bulk.inputs.lists import Columns, ListFile
from server.bulk.progress import Progress
from tests.support.paths import ROOT, SAMPLES


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--max-image-mb", "nan"], "nan is no size: give a number above 0"),
    (["--max-image-mb", "inf"], "inf is no size"),
    (["--max-image-mb", "-1"], "-1 is no size"),
    (["--max-image-mb", "x"], "'x' is no number"),
    (["--max-pixels", "-5"], "-5 is too small: give 1 or more"),
    (["--ray-cores", "-1"], "-1 is too small"),
    (["--slots", "0"], "0 is too small"),
    (["--url", "http://[::1"], "is no URL: Invalid IPv6 URL"),
    (["--url", "http://127.0.0.1:99999"], "is no URL: Port out of range"),
    (["--url", "localhost:8000"], "looks like http://host:8000"),
    (["--model", "x"], "--model is of a service's: add its --url"),
    (["-", "--ray", "local"], "standard input is of one machine: with --ray name a list"),
    (["--url", "http://a b/"], "looks like http://host:8000"),
    (["--prompt", "\udcff"], "is not UTF-8"),
    (["--slots", "9" * 20], "is too large"),
])  # fmt: skip
def test_a_flag_that_can_not_be_meant_is_a_usage_error(flags, complaint, capfd):
    with pytest.raises(SystemExit) as ended:
        main(["nowhere", *flags])
    assert ended.value.code == 2
    assert complaint in capfd.readouterr().err


def test_a_full_disk_is_told_with_the_output_on_it(tmp_path, monkeypatch, capfd):
    (tmp_path / "list.txt").write_text("a.png\n")
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(command, "open_output", full)
    assert main([str(tmp_path / "list.txt"), "--output", "captions.csv"]) == 1
    assert capfd.readouterr().err == "error: captions.csv: [Errno 28] No space left on device\n"


def test_a_closed_standard_input_is_a_usage_error(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit):
        main(["-"])
    assert "standard input is closed" in capfd.readouterr().err


def test_an_interrupt_while_a_command_is_loaded_is_no_error(monkeypatch, capfd):
    def load(_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["vignette", "caption", "x"])
    monkeypatch.setattr(vignette.importlib, "import_module", load)
    assert vignette.main() == 130
    assert capfd.readouterr().err == "interrupted\n"


def test_lines_come_while_standard_input_is_silent_and_an_interrupt_ends_it():
    command = [sys.executable, "-m", "vignette", "caption", "-"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as program:
        assert program.stdin and program.stdout and program.stderr
        for name in ("cats.png", "owl.png"):
            program.stdin.write(os.fsencode(SAMPLES / name) + b"\n")
            program.stdin.flush()
            assert json.loads(program.stdout.readline())["id"] == str(SAMPLES / name)
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 130
        assert program.stderr.read().endswith(b"interrupted\n")


def test_a_total_that_can_not_be_counted_is_not_known(tmp_path, capfd):
    (tmp_path / "list.csv").write_text("url\na.png\n")
    (tmp_path / "list.parquet").write_bytes(b"PAR1")
    for name in ("list.csv", "list.parquet"):
        with Progress([ListFile(str(tmp_path / name), Columns())]) as progress:
            for thread in threading.enumerate():
                if thread.name == "count":
                    thread.join()
        assert progress._total is None
    assert not capfd.readouterr().err
