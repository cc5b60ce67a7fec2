"""Whatever names images: each of them once, as it streams, or what is wrong with it."""

import base64
import contextlib
import http.server
import io
import json
import os
import sys
import tarfile
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pyarrow as pa
import pyarrow.parquet
import pytest

from server.bulk.inputs import fetching, web
from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.lists import Columns, ListFile, NoColumn
from server.bulk.inputs.parts import NoImages, items, parts, split
from tests.support.paths import SAMPLES
from tests.support.web_servers import served

OWL = (SAMPLES / "owl.png").read_bytes()


def read(*given, image=None, prompt=None, called=None, limit=10**7):
    return list(items(parts(map(str, given), Columns(image, prompt, called), limit)))


def test_a_pattern_means_what_a_shell_finds(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/d.txt", "[odd].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = read(tmp_path / "**" / "*.[jp]*")
    assert [item.id for item in found] == [str(tmp_path / n) for n in ("[odd].png", "a.jpg")]
    assert [item.id for item in read(tmp_path / "**/*")][-1] == str(tmp_path / "b" / "c.PNG")
    assert [item.id for item in read(tmp_path / "[odd].png")] == [str(tmp_path / "[odd].png")]


def test_a_list_names_paths_relative_to_itself(tmp_path):
    (tmp_path / "photos").mkdir()
    listed = tmp_path / "photos" / "list.txt"
    listed.write_bytes(b"a.png\r\n\n/b/c.png\ns3://bucket/d.png\ndata:image/png;base64,AA==\n")
    found = read(listed)
    assert [item.id for item in found] == [
        f"{tmp_path}/photos/a.png", "/b/c.png", "s3://bucket/d.png", f"{listed}#5",
    ]  # fmt: skip
    assert [item.image for item in found][:2] == [f"{tmp_path}/photos/a.png", "/b/c.png"]
    assert [item.name for item in found][:3] == ["a", "b/c", "d"]


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """Gives standard input a content."""
    with ExitStack() as files:

        def give(content: bytes) -> None:
            path = tmp_path / "stdin"
            path.write_bytes(content)
            monkeypatch.setattr(sys, "stdin", files.enter_context(path.open()))

        yield give


def test_standard_input_is_a_list(listed):
    listed(b"a.png\nb.png")
    assert [item.image for item in read("-")] == ["a.png", "b.png"]


ROWS = [
    {"image": "a.png", "q": "how many?", "key": "one"},
    {"image": "b.png", "q": "", "key": "two"},
    {"image": "", "q": "x", "key": "three"},
]


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request, tmp_path):
    path = tmp_path / f"list.{request.param}"
    if request.param == "csv":
        lines = [",".join(row.values()) for row in ROWS]
        path.write_text("image,q,key\n" + "\n".join(lines) + "\n")
    elif request.param == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)
    return path


def test_a_name_that_is_not_utf_8_changes_no_prompt(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"b\xff.png\na.png\n")
    found = items(parts([str(tmp_path / "list.txt")], Columns(), 10), prompt=r"what \x is")
    assert {item.prompt for item in found} == {r"what \x is"}


def test_a_table_that_can_not_be_split_tells_as_it_is_read(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    given = split(parts([str(tmp_path / "broken.parquet")], Columns(), 10))
    [item] = items(given)
    assert item.id.endswith("broken.parquet#end") and item.wrong


def test_a_table_has_columns_of_images_prompts_and_ids(table):
    first, second, third = read(table, image="image", prompt="q", called="key")
    assert (first.id, first.prompt) == ("one", "how many?")
    assert first.image == str(table.parent / "a.png")
    assert (second.id, second.prompt) == ("two", None)
    assert (third.id, third.wrong) == (f"{table}#3", "there is no path, URL or image in image")
    found = [item.id for item in read(table)]
    assert found[:2] == [f"{table.parent}/a.png", f"{table.parent}/b.png"]


def test_a_column_that_is_not_there_is_told(tmp_path):
    (tmp_path / "list.csv").write_text("url,text\nhttps://a/b.png,c\n")
    with pytest.raises(NoColumn, match=r"no column image: name one of url, text with --column"):
        read(tmp_path / "list.csv")
    assert [item.id for item in read(tmp_path / "list.csv", image="url")] == ["https://a/b.png"]


def test_images_may_lie_in_a_csv_file_themselves(tmp_path):
    inline = "data:image/png;base64," + "A" * 200_000  # beyond csv's default field limit
    (tmp_path / "list.csv").write_text(f'image,prompt\n"{inline}",what?\nb.png,\n')
    found = read(tmp_path / "list.csv", prompt="prompt")
    assert [item.prompt for item in found] == ["what?", None]
    assert [item.wrong for item in found] == [None, None]


def test_relative_urls_of_files_are_relative_to_the_list_too(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("file://a.png\nfile:///b.png\n")
    assert [item.image for item in read(path)] == [str(tmp_path / "a.png"), "file:///b.png"]


def test_a_line_that_is_none_fails_alone(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"image": "a.png"}\n{"image": \n[1]\n\n{"image": "b.png"}\n')
    found = read(path)
    assert [item.image for item in found if item.wrong is None] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]
    assert [item.wrong for item in found][1].startswith("this line is no JSON: ")
    assert [item.wrong for item in found][2] == "this line is no JSON object"


def test_parquet_holds_images_themselves_and_is_read_row_group_by_row_group(tmp_path):
    path = tmp_path / "images.parquet"
    rows = [{"image": {"bytes": OWL, "path": None}}, {"image": {"bytes": None, "path": "x.png"}}]
    pa.parquet.write_table(pa.Table.from_pylist(rows * 3), path, row_group_size=2)
    whole = read(path)
    assert [item.id for item in whole][:2] == [f"{path}#1", f"{tmp_path}/x.png"]
    assert whole[0].image == OWL
    [table] = parts([str(path)], Columns(), 10**7)
    apart = [part.items() for part in table.parts()]
    assert len(apart) == 3
    assert [item.id for part in apart for item in part] == [item.id for item in whole]


def shard(path, members) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["shard-0.tar", "shard-0.tar.gz"])
def test_neighbours_in_a_shard_are_samples(name, tmp_path):
    shard(tmp_path / name, {
        "a.b/one.jpg": b"1", "a.b/one.txt": b"what?\n", "a.b/one.seg.png": b"s",
        "two.txt": b"no image", "three.png": b"2", "large.png": b"3" * 2000,
    })  # fmt: skip
    first, second, third, fourth = read(tmp_path / name, limit=1000)
    assert (first.id, first.key, first.image) == (f"{tmp_path / name}/a.b/one", "a.b/one", b"1")
    assert first.members == {"jpg": b"1", "txt": b"what?\n", "seg.png": b"s"}
    assert second.wrong == "there is no image among txt"
    assert third.image == b"2"
    assert "more than 0.001 MB" in fourth.wrong
    [asked] = [item for item in read(tmp_path / name, image="jpg", prompt="txt") if not item.wrong]
    assert asked.prompt == "what?"


def test_a_shard_that_is_cut_off_is_told(tmp_path):
    shard(tmp_path / "whole.tar", {f"{n}.jpg": b"x" * 1000 for n in range(9)})
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[:5000])
    found = read(tmp_path / "*.tar")
    assert [item.image for item in found] == [b"x" * 1000] * 2 + [b""] + [b"x" * 1000] * 9
    assert found[2].id == f"{tmp_path}/cut.tar#end"
    assert "no whole tar archive" in found[2].wrong
    with pytest.raises(NoImages, match="nothing is called like"):
        read(tmp_path / "other*.tar")


def test_what_fsspec_knows_is_read_like_a_folder(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("photos/a.png", "photos/more/b.PNG", "photos/.c.png", "photos/list.txt"):
        memory.pipe(f"/{name}", OWL if name.endswith("png") else b"a.png\n")
    found = read("memory://photos")
    assert [(item.id, item.name) for item in found] == [
        ("memory:///photos/a.png", "a"), ("memory:///photos/more/b.PNG", "more/b"),
    ]  # fmt: skip
    [listed] = read("memory://photos/list.txt")
    assert fetching.fetch(listed.image, 10**7) == OWL
    assert [item.id for item in read("memory://photos/*.png")] == ["memory:///photos/a.png"]
    with pytest.raises(fetching.NoWay, match="can't be opened"):
        fetching.fetch("nosuch://a/b.png", 10)


def test_a_data_uri_is_an_image():
    uri = "data:image/png;base64," + base64.b64encode(OWL).decode()
    assert fetching.fetch(uri, 10**7) == OWL


@pytest.fixture
def site():
    """A server that gives /owl.png at the third request; counts requests by path."""
    asked: Counter[str] = Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            fine = self.path != "/gone.png" and (self.path != "/owl.png" or asked[self.path] > 2)
            self.send_response(200 if fine else 404 if "gone" in self.path else 503)
            self.end_headers()
            with contextlib.suppress(OSError):  # a client that has read enough hangs up
                self.wfile.write(OWL if self.path == "/owl.png" else b"x" * 10**7)

    with served(Handler) as url:
        yield url, asked


def test_what_may_work_later_is_tried_again(site, monkeypatch):
    url, asked = site
    monkeypatch.setattr(web, "_LONGEST_WAIT", 0.01)
    assert fetching.fetch(f"{url}/owl.png", 10**6) == OWL
    with pytest.raises(UnfitItem, match="answered 404"):
        fetching.fetch(f"{url}/gone.png", 10**6)
    with pytest.raises(UnfitItem, match=r"more than 1 MB"):
        fetching.fetch(f"{url}/large", 10**6)
    assert asked == {"/owl.png": 3, "/gone.png": 1, "/large": 1}


def test_a_list_streams(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb", buffering=0) as source, os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        source.write(b"a.png\n" * 3)
        assert next(items(parts(["-"], Columns(), 10))).image == "a.png"  # the list has not ended


def test_a_list_that_does_not_block_is_read_to_its_end(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(writing, "wb", buffering=0) as source, os.fdopen(reading) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        found = items(parts(["-"], Columns(), 10))
        source.write(b"a.png\nb")
        assert next(found).image == "a.png"
        later = threading.Timer(0.2, lambda: (source.write(b".png\n"), source.close()))
        later.start()
        assert [item.image for item in found] == ["b.png"]
        later.join()


def test_lists_in_several_folders_may_name_the_same_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/list.txt", "a/more.txt", "b/list.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("1.png\n/other/2.png\n")
    found = read("a/list.txt", "a/more.txt", "b/list.txt")
    assert [item.id for item in found[::2]] == ["a/1.png", "a/1.png", "b/1.png"]
    assert [item.name for item in found[::2]] == ["1", "1", "b/1"]
    assert {item.id for item in found[1::2]} == {"/other/2.png"}


def test_a_file_called_as_standard_input_is_does_not_read_it(listed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").touch()
    listed(b"a.png\n")
    assert ListFile("-", Columns()).count(Event()) is None
    assert len(read("-")) == 1
