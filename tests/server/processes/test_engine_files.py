"""What a worker has mapped is watched, whatever its name is by now."""

import errno
import hashlib
import os
import signal

import pytest

from server.processes import engine_files
from server.processes.engine_files import EngineFiles

WEIGHTS = bytes(range(256)) * 64


class Ended(Exception):
    pass


@pytest.fixture
def folder(tmp_path, monkeypatch):
    def kill(process, number):
        assert (process, number) == (os.getpid(), signal.SIGKILL)
        raise Ended

    monkeypatch.setattr(engine_files.os, "kill", kill)
    monkeypatch.setattr(EngineFiles, "_watch", lambda _: None)
    made = tmp_path / "v1"
    made.mkdir()
    (made / "weights.data").write_bytes(WEIGHTS)
    return made


def watched(folder):
    files = EngineFiles(folder)
    files.watch({"weights.data": hashlib.sha256(WEIGHTS).hexdigest()})
    files.check()
    return files


def test_a_file_is_watched_when_another_has_its_name(folder):
    files = watched(folder)
    mapped = (folder / "weights.data").rename(folder / "old")
    (folder / "weights.data").write_bytes(b"another")
    files.check()
    with mapped.open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(Ended):
        files.check()


def test_a_file_is_watched_when_a_link_to_its_folder_leads_elsewhere(folder):
    link = folder.with_name("current")
    link.symlink_to("v1")
    files = watched(link)
    link.unlink()
    link.symlink_to("v2")
    files.check()
    with (folder / "weights.data").open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(Ended):
        files.check()


def test_a_file_that_is_touched_or_written_with_what_it_holds_is_the_same(folder):
    files = watched(folder)
    (folder / "weights.data").touch()
    files.check()
    (folder / "weights.data").write_bytes(WEIGHTS)
    files.check()


def test_a_file_that_can_not_be_read_any_more_ends_the_worker(folder, monkeypatch):
    """A stale handle of a network file system: what was captioned is not to blame."""
    files = watched(folder)

    def stale(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(engine_files, "_state", stale)
    with pytest.raises(Ended):
        files.check()


def test_what_is_no_file_of_the_engine_does_not_matter(folder, monkeypatch):
    (folder / "notes.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    real = os.open

    def private(path, *given):
        if path.name == "notes.txt":
            raise PermissionError
        return real(path, *given)

    monkeypatch.setattr(engine_files.os, "open", private)
    files = watched(folder)
    assert files._open.keys() == {"weights.data"}


@pytest.mark.parametrize("content", [b"another", None])
def test_a_file_that_was_replaced_while_it_was_loaded_ends_the_worker(content, folder):
    files, path = EngineFiles(folder), folder / "weights.data"
    path.rename(folder / "old")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Ended):
        files.watch({"weights.data": hashlib.sha256(WEIGHTS).hexdigest()})


def test_a_file_that_was_replaced_by_its_equal_is_watched_in_its_place(folder):
    files, path = EngineFiles(folder), folder / "weights.data"
    path.rename(folder / "old")
    path.write_bytes(WEIGHTS)
    files.watch({"weights.data": hashlib.sha256(WEIGHTS).hexdigest()})
    files.check()
    with path.open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(Ended):
        files.check()
