"""Folders and patterns: which files they mean, and what those are called in the output."""

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Event

import fsspec
import pytest

from server.bulk.inputs.folders import Files, restored
from server.bulk.inputs.items import NoWay
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts


def read(*given, output="-"):
    return list(items(parts(map(str, given), Columns(), 10**7, output)))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "README.md", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("given", [".", "*", "**"])
def test_of_a_folder_or_pattern_only_images_are_meant(given, here):
    files = Files(given)
    assert "README.md" not in [item.id for item in files.items()]
    assert files.skipped == Counter({".md": 1, "folders": given == "*"})
    assert [item.id for item in Files("README.md").items()] == ["README.md"]


def test_a_name_that_looks_like_another_s_bytes_is_told_apart(here):
    names = {b"\xff.png", rb"\xff.png", rb"\\xff.png", rb"plain\back.png", b"\xed\xa0\x80.png"}
    for name in names:
        Path(os.fsdecode(name)).touch()
    ids = [item.id for item in read(".")]
    assert len(set(ids)) == len(ids) == 7
    assert all(each.isprintable() for each in ids) and r"plain\back.png" in ids
    assert names < {os.fsencode(restored(each)) for each in ids}


def test_a_name_leads_nowhere_else(here, monkeypatch):
    monkeypatch.chdir(here / "sub")
    [item] = read("../*.png")
    assert (item.id, item.name) == ("../a.png", "a")
    assert [item.name for item in read("../a.png", "..")] == ["a", "a", "sub/b"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("**/*.png", ["a.png", "sub/b.png", "sub/deep/c.png"]),
        ("**", ["a.png", "sub/b.png", "sub/deep/c.png"]),
        ("s?b/**", ["sub/b.png", "sub/deep/c.png"]),
        ("sub/**/*.png", ["sub/b.png", "sub/deep/c.png"]),
        ("**/deep/*", ["sub/deep/c.png"]),
        ("**/s[u]b/**/[b-c].png", ["sub/b.png", "sub/deep/c.png"]),
        ("*/*.png", ["back/a.png", "self/a.png", "sub/b.png"]),
        ("**/*.PNG", []),
        ("se*/sub/**/c.*", ["self/sub/deep/c.png"]),
    ],
)
def test_a_pattern_for_any_depth_does_not_go_in_circles(pattern, found, here):
    for name in ("sub/deep/c.png", "sub/.hidden/d.png"):
        (here / name).parent.mkdir()
        (here / name).touch()
    (here / "self").symlink_to(".")
    (here / "back").symlink_to(here)
    assert [item.id for item in read(pattern)] == found
    assert Files(str(here / pattern)).count(Event()) == len(found)


def close(here, monkeypatch, owner, listing):
    """Make a folder whose listing is forbidden, also to root."""
    listed = getattr(owner, listing)

    def forbidden(folder):
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    (here / "closed").mkdir(exist_ok=True)
    monkeypatch.setattr(owner, listing, forbidden)


def test_a_folder_that_can_not_be_read_fails_alone(here, monkeypatch):
    close(here, monkeypatch, Path, "iterdir")
    found = read(here)
    assert [item.name for item in found] == ["a", "", "sub/b"]
    assert found[1].id == str(here / "closed")
    assert "Permission denied" in found[1].wrong
    assert Files(str(here)).count(Event()) == 3


@pytest.mark.parametrize("pattern", ["*/*.png", "clo*d/*.png", "closed/*/c.png"])
def test_a_pattern_does_not_leave_out_what_can_not_be_read(pattern, here, monkeypatch):
    close(here, monkeypatch, os, "listdir")
    closed = next(item for item in read(pattern) if item.id == "closed")
    assert "Permission denied" in closed.wrong


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("given", ["", "*", "a.png"])
def test_a_file_whose_kind_can_not_be_told_fails_alone(given, number, here, monkeypatch):
    there = Path.stat

    def stat(path, **how):
        if path.name == "a.png":
            raise OSError(number, os.strerror(number), str(path))
        return there(path, **how)

    monkeypatch.setattr(Path, "stat", stat)
    wrong = [item for item in read(str(here / given)) if item.wrong is not None]
    assert [Path(item.id).name for item in wrong] == ["a.png"]
    assert os.strerror(number) in wrong[0].wrong


@pytest.mark.parametrize("pattern", ["", "*/*.png", "**/*.png"])
def test_a_folder_by_url_that_can_not_be_read_is_told(pattern, here, monkeypatch):
    url = f"file://{here}/{pattern}"
    (here / "closed").mkdir()
    (here / ".hidden").mkdir()
    whole = []
    pictures = ["sub/b.png"] if pattern == "*/*.png" else ["a.png", "sub/b.png"]
    found = [item.id for item in Files(url).items(whole.append)]
    assert found == [f"file://{here}/{name}" for name in pictures]
    assert {f"file://{here}", f"file://{here}/closed"} <= set(whole)
    assert [item.id for item in Files(url.replace("sub", "s?b")).items()] == found
    close(here, monkeypatch, os, "scandir")
    [told] = [item for item in Files(url).items() if item.wrong]
    assert told.id == f"file://{here}/closed" and "Permission denied" in told.wrong


def test_a_folder_may_be_as_deep_as_the_system_lets_it(here):
    depth = sys.getrecursionlimit() + 100
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    Path("deep.png").touch()
    os.chdir(here)
    [deep] = [item for item in read("**/*/*") if item.name.endswith("deep")]
    subprocess.run(["rm", "-r", "d"], check=True)  # pytest could not
    assert deep.id.count("/") == depth


def test_what_a_run_has_made_is_no_input_of_the_next(here):
    for name in ("1.tar", "out.tar", "list.csv", "all.csv", "list.jsonl", "all.csv.rows.jsonl"):
        (here / name).touch()
    assert [part.path for part in parts(["*.tar"], Columns(), 1, f"{here}/out.tar")] == ["1.tar"]
    assert [part.path for part in parts(["*.csv"], Columns(), 1, "all.csv")] == ["list.csv"]
    assert [part.path for part in parts(["*.jsonl"], Columns(), 1, "all.csv")] == ["list.jsonl"]


def test_a_package_that_is_missing_is_told(monkeypatch):
    def none(*_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", none)
    with pytest.raises(NoWay, match="s3://bucket/photos can't be opened: Install s3fs"):
        read("s3://bucket/photos")


def test_what_a_file_system_raises_ends_its_part_alone(here, monkeypatch):
    class Gone(Exception):
        pass

    def none(*_):
        raise Gone("no such bucket")

    monkeypatch.setattr(fsspec.core, "url_to_fs", none)
    bad, good = read("s3://bucket/photos", "a.png")
    assert bad.wrong == "it can't be read to its end: no such bucket"
    assert good.id == "a.png"
