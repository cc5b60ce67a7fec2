"""One row of a list, whatever is wrong with it, and no more: the others are read."""

import csv
import io
import json
import os
from threading import Event

import pyarrow as pa
import pyarrow.parquet
import pytest

from server.bulk.inputs import rows
from server.bulk.inputs.lists import Columns, ListFile
from server.bulk.inputs.parts import items, parts


def read(path, called=None):
    return list(items(parts([str(path)], Columns(id=called), 10**7)))


def names(found) -> list[str | None]:
    """Of what was read: the image's name, or None."""
    return [None if item.wrong else item.name for item in found]


@pytest.mark.parametrize(("name", "before", "row"), [
    ("list.txt", "", "{}"), ("list.csv", "image\n", "{}"), ("list.jsonl", "", '{{"image": "{}"}}'),
])  # fmt: skip
def test_a_line_that_is_too_long_fails_alone_and_is_not_held(
    name, before, row, tmp_path, monkeypatch
):
    monkeypatch.setattr(rows, "_LONGEST_LINE", 100)
    given = ["a.png", "x" * 1000, "b.png", "y" * (100 - len(row.format("")) - 1), "c.png"]
    (tmp_path / name).write_text(before + "\n".join(row.format(each) for each in given))
    found = read(tmp_path / name)
    assert names(found) == ["a", None, "b", given[3], "c"]
    assert found[1].id == f"{tmp_path / name}#2"
    assert "this line has over" in found[1].wrong


def test_a_csv_field_that_is_too_long_fails_alone(tmp_path):
    (tmp_path / "list.csv").write_text("image\na.png\n" + "x" * 2000 + "\nb.png\n")
    before = csv.field_size_limit(1000)
    try:
        found = read(tmp_path / "list.csv")
    finally:
        csv.field_size_limit(before)
    assert names(found) == ["a", None, "b"]
    assert "field larger than field limit" in found[1].wrong


def test_a_csv_row_of_too_many_lines_fails_alone_and_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_LONGEST_LINE", 100)
    fields = 'x","\n' * 40  # at each line's end one is open
    (tmp_path / "list.csv").write_text(f'image\na.png\n"{fields}"\nb.png\n')
    found = read(tmp_path / "list.csv")
    assert names(found)[0] == "a" and names(found)[-1] == "b"
    assert "this row has over" in found[1].wrong


def test_a_quote_that_is_never_closed_does_not_swallow_rows_unseen(tmp_path):
    text = 'image,by\na.png,"so, closed"\nb.png,"not closed\nc.png,x\nd.png,y\n'
    (tmp_path / "list.csv").write_text(text)
    found = read(tmp_path / "list.csv")
    assert names(found) == ["a", None]
    assert "a quote in it is never closed" in found[1].wrong


def test_a_url_or_path_that_is_none_fails_alone(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"a.png\nhttp://[::1\n{'x' * 70_000}\n..\nb.png\n")
    found = read(path)
    long = f"a path, prompt or id has {len(str(tmp_path)) + 1 + 70_000} characters: that is none"
    assert [item.wrong for item in found] == [None, "Invalid IPv6 URL", long, None, None]


def test_a_parquet_row_that_is_no_text_fails_alone(tmp_path):
    bad = pa.Array.from_buffers(
        pa.string(), 3, pa.array([b"a.png", b"\xff.png", b"b.png"], pa.binary()).buffers()
    )
    pa.parquet.write_table(pa.table({"image": bad}), tmp_path / "list.parquet")
    assert names(read(tmp_path / "list.parquet")) == ["a", None, "b"]


def test_large_parquet_rows_come_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_LARGE", 1000)
    large = pa.table({"image": [b"x" * 10_000] * 12})
    pa.parquet.write_table(large, tmp_path / "list.parquet", row_group_size=6)
    monkeypatch.setattr(rows, "_cells", lambda row: row)
    with (tmp_path / "list.parquet").open("rb") as stream:
        found = [row for _, row in rows.parquet_rows(stream, list, ["image"])]
    assert len(found) == 12
    offsets = {row.columns[0].buffers()[1].size for row in found}
    assert max(offsets) < 8 * 4  # of one row, not of eight


def test_parts_of_a_table_that_is_another_now_are_not_read(tmp_path):
    path = tmp_path / "list.parquet"
    pa.parquet.write_table(pa.table({"image": ["a.png"] * 6}), path, row_group_size=3)
    first, second = ListFile(str(path), Columns()).parts()
    assert len(list(first.items())) == 3
    pa.parquet.write_table(pa.table({"image": ["b.png"] * 6}), path, row_group_size=3)
    with pytest.raises(OSError, match="it changed while it was read"):
        list(second.items())


def test_a_parquet_row_group_is_not_read_whole(tmp_path):
    table = pa.table({"image": [os.urandom(100_000) for _ in range(300)]})
    path, read = tmp_path / "list.parquet", []
    pa.parquet.write_table(
        table, path, compression="none", use_dictionary=False, write_batch_size=10
    )

    class Counted(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    with Counted(path) as stream:
        found = rows.parquet_rows(stream, list, ["image"])
        for _ in range(10):
            next(found)
        assert sum(read) < 2**23
        found.close()


def test_a_parquet_time_that_python_does_not_have_fails_alone(tmp_path):
    path = tmp_path / "list.parquet"
    days = pa.array([0, 10**7, 1], pa.int32()).cast(pa.date32())
    pa.parquet.write_table(pa.table({"image": ["a.png", "x.png", "b.png"], "day": days}), path)
    assert names(read(path, "day")) == ["a", None, "b"]


def test_an_id_may_be_nought(tmp_path):
    (tmp_path / "list.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{n}.png", "n": n}) for n in (0, 1, False, None))
    )
    assert [item.id for item in read(tmp_path / "list.jsonl", called="n")] == [
        "0", "1", "False", f"{tmp_path / 'list.jsonl'}#4",
    ]  # fmt: skip


def test_json_that_is_no_object_is_not_taken_for_a_message(tmp_path):
    (tmp_path / "list.jsonl").write_text('"x"\n')
    assert [item.wrong for item in read(tmp_path / "list.jsonl")] == ["this line is no JSON object"]


def test_a_list_may_begin_with_a_mark_and_be_named_in_capitals(tmp_path):
    (tmp_path / "list.TXT").write_bytes(b"\xef\xbb\xbfa.png\nb.png\n")
    (tmp_path / "LIST.CSV").write_text("image\na.png\n")
    assert names(read(tmp_path / "list.TXT")) == ["a", "b"]
    assert names(read(tmp_path / "LIST.CSV")) == ["a"]


def test_a_pipe_is_not_read_for_its_number_of_rows(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    assert ListFile(str(tmp_path / "list.txt"), Columns()).count(Event()) is None


@pytest.mark.parametrize("name", ["list.txt", "list.csv", "list.jsonl"])
def test_a_list_is_read_from_what_knows_no_lines(name):
    import fsspec
    from fsspec.spec import AbstractBufferedFile

    class Remote(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            return content[start:end]

    class Files(fsspec.AbstractFileSystem):
        protocol = "bulkrows"

        def _open(self, path, *_, **__):
            return Remote(self, path, size=len(content))

    content = b'{"image": "a.png"}\n' if name.endswith("jsonl") else b"image\na.png\n"
    fsspec.register_implementation("bulkrows", Files, clobber=True)
    assert names(read(f"bulkrows://x/{name}"))[-1] == "a"
