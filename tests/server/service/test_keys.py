"""API keys: who may come in, how often, and how many at once."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.errors import InvalidRequest
from server.refusals import TooFast
from server.service.keys import InvalidKeys, Keys, Unauthorised, main, read
from tests.support.fakes import fake_engine
from tests.support.live import png, serve, until
from tests.support.paths import ROOT


def keys_file(tmp_path, *lines: str):
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return path


def line(name: str, key: str, rate: str = "0", at_once: str = "0") -> str:
    return f"{name} {hashlib.sha256(key.encode()).hexdigest()} {rate} {at_once}"


def test_only_those_with_a_key_come_in(tmp_path, caplog):
    path = keys_file(tmp_path, "# ours", line("web", "secret-key"), line("app", "other"))
    with serve(fake_engine, api_keys=path) as live:
        for headers in ({}, {"Authorization": "Bearer nope"}, {"X_API_Key": "nope"}):
            reply = live.caption(png(), **headers)
            assert (reply.status, reply.error) == (401, "unauthorised")
            assert reply.headers["Www-Authenticate"] == "Bearer"
        assert live.caption(png(), Authorization="Bearer secret-key").status == 200
        assert live.caption(png(), X_API_Key="other").status == 200
        assert live.request("GET", "/health/live").status == 200
    assert "secret-key" not in caplog.text


def test_a_key_has_a_rate_and_a_number_at_once(tmp_path):
    path = keys_file(tmp_path, line("slow", "a", "1"), line("narrow", "b", "0", "1"))
    keys = Keys.open(path, tmp_path)
    for _ in range(2):  # two seconds' worth at once
        with keys.enter("a"):
            pass
    with pytest.raises(TooFast, match="1 requests a second") as said, keys.enter("a"):
        pass
    assert said.value.retry_after == 1
    with keys.enter("b") as name:
        assert name == "narrow"
        with pytest.raises(TooFast, match="1 requests at once"), keys.enter("b"):
            pass
    with keys.enter("b"), pytest.raises(Unauthorised), keys.enter("c"):
        pass


def test_the_images_of_a_request_have_places_all_or_none(tmp_path):
    path = keys_file(tmp_path, line("slow", "a", "5"), line("narrow", "b", "0", "2"))
    keys = Keys.open(path, tmp_path)
    with (
        pytest.raises(InvalidRequest, match="may send 10 at once"),
        keys.enter("a", 10, held=1),
    ):
        pass
    with keys.enter("a"), keys.enter("a", 4, held=1):  # five of ten are left
        pass
    with keys.enter("a"), pytest.raises(TooFast) as said, keys.enter("a", 9, held=1):
        pass
    assert said.value.retry_after == 2, "six more, as the first image takes its place again"
    with keys.enter("a"), keys.enter("a", 3, held=1):
        pass
    with (
        pytest.raises(InvalidRequest, match="may send 2 at once"),
        keys.enter("b", 2, held=1),
    ):
        pass
    with keys.enter("b"), keys.enter("b", 1, held=1):
        pass
    with keys.enter("b", 2):
        pass


def test_front_ends_count_together(tmp_path):
    path = keys_file(tmp_path, line("slow", "a", "0.5"), line("narrow", "b", "0", "1"))
    first, second = (Keys.open(path, tmp_path, 2, index) for index in range(2))
    with (
        first.enter("a"),
        pytest.raises(TooFast, match=r"0\.5 requests a second"),
        second.enter("a"),
    ):
        pass
    with second.enter("b"), pytest.raises(TooFast, match="1 requests at once"), first.enter("b"):
        pass
    with first.enter("b"):
        pass
    died = first.enter("b")
    died.__enter__()
    with pytest.raises(TooFast), second.enter("b"):
        pass
    restarted = Keys.open(path, tmp_path, 2, 0)
    with restarted.enter("b"):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [("web abc 0 0", "line 1"), ("web", "line 1"), ("", "has no keys"),
     ("a " + "00" * 8 + " 0 0", "sha256"), ("a " + "00" * 32 + " nan 0", "line 1"),
     ("a " + "00" * 32 + " 0 -1", "line 1"),
     (f"a {'00' * 32} 0 0\nb {'00' * 32} 5 0", "line 2: an earlier line has this key")],
)  # fmt: skip
def test_a_key_file_that_is_wrong_is_named(tmp_path, text, message):
    with pytest.raises(InvalidKeys, match=message):
        read(keys_file(tmp_path, text))
    with pytest.raises(InvalidKeys, match="can't be read"):
        read(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidKeys, match="is no file"):
        read(tmp_path / "pipe")


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    assert [c.name for c in read(keys_file(tmp_path, f"\ufeffweb {'00' * 32} 0 0"))] == ["web"]


def test_keys_are_made_with_a_command(tmp_path):
    made = subprocess.run(
        [sys.executable, "-m", "vignette", "keys", "web", "5"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = made.stderr.rpartition(": ")[2].strip()
    with Keys.open(keys_file(tmp_path, made.stdout), tmp_path).enter(key) as name:
        assert name == "web"


@pytest.mark.parametrize("words", [["bob smith"], ["bob", "often"], ["bob", "1", "2.5"]])
def test_a_key_that_the_server_would_refuse_is_not_made(words, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert "NAME is one word" in said.err
    assert not said.out


def test_of_two_readings_at_once_the_later_one_counts(tmp_path, monkeypatch):
    path = keys_file(tmp_path, line("web", "a"))
    read_slowly, opened = threading.Event(), Keys.open

    def slow_once(*given):
        found = opened(*given)
        if given[-1] == 1:
            read_slowly.wait(20)
        return found

    with serve(fake_engine, api_keys=path) as live:
        monkeypatch.setattr(Keys, "open", slow_once)
        for reading, key in enumerate("bc", 1):
            keys_file(tmp_path, line("web", key))
            live.loop.call_soon_threadsafe(live.service.key_reader.read, reading)
            until(lambda reading=reading: live.service.key_reader.reading == reading)
        read_slowly.set()
        until(lambda: live.caption(png(), X_API_Key="c").status == 200)
        assert live.caption(png(), X_API_Key="b").status == 401
        assert len(list(live.service.model().store.path.parent.glob("usage-*"))) == 1


def test_a_front_end_that_finds_another_file_counts_for_itself(tmp_path):
    ours = Keys.open(keys_file(tmp_path, line("a", "a"), line("b", "b", "0", "1")), tmp_path, 2, 0)
    edited = keys_file(tmp_path, line("b", "b", "0", "1"), line("a", "a"))
    with ours.enter("b"), Keys.open(edited, tmp_path, 2, 1).enter("a"):
        pass


def test_keys_that_are_read_again_leave_nothing_of_the_old_ones_behind(tmp_path):
    path = keys_file(tmp_path, f"web {hashlib.sha256(b'a').hexdigest()} 0 1\n")
    files = len(list(Path("/proc/self/fd").iterdir()))
    keys = Keys.open(path, tmp_path)
    for reading in range(1, 20):
        with keys.enter("a"):
            old, keys = keys, Keys.open(path, tmp_path, reading=reading)
            old.close()
        del old
    assert [p.name.split("-")[1] for p in tmp_path.glob("usage-*")] == ["19"]
    assert len(list(Path("/proc/self/fd").iterdir())) <= files + 2
