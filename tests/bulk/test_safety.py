"""Outputs that hold what somebody else wrote: that stays, and nothing is written elsewhere."""

import io
import json
import os
import tarfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
from PIL import Image

from server.bulk.inputs.fetching import fetch
from server.bulk.inputs.items import UnfitItem
from server.bulk.inputs.keys import key
from server.bulk.inputs.parts import NoImages
from server.bulk.outputs.base import OutputConflict
from server.bulk.outputs.tar import Tar
from server.bulk.run import CaptionSettings
from tests.support import bulk_job
from tests.support.bulk_job import check, members, rows_of, run
from tests.support.live import png, small_images

ROW = {"caption": "an owl", "model": "words", "settings": {"engine": "none"}}


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    small_images(folder, 3)
    return folder


@pytest.mark.parametrize(
    "content",
    [
        '{"id":5,"precious":"data"}',
        '{"id":"a.png","precious":"da',
        '{"id":"a.png","caption":"an owl","notes":"mine"}',
        '{"id":"a.png","caption":"an owl","notes":"mine"}\n',
        '{"id":"a.png","image":"a.png"}\n',
        '{"id":"a.png","caption":"an owl","error":"none"}\n',
        '{"id":"a.png","caption":"' + "\xff" + '"}\n',
        '{"id":"a.png","caption":"b","settings":{"a":' + "[" * 10_000 + "\n",
    ],
)
def test_a_line_that_is_no_row_is_kept_and_named(content, tmp_path):
    output = tmp_path / "rows.jsonl"
    output.write_text(json.dumps({"id": "b.png"} | ROW) + "\n" + content, "latin-1")
    kept = output.read_bytes()
    with pytest.raises(OutputConflict, match="line 2, is no row of ours"):
        run(str(output), str(tmp_path), again=True, retry=True)
    assert output.read_bytes() == kept
    output.write_text(content, "latin-1")
    with pytest.raises(OutputConflict, match="line 1, is no row of ours"):
        run(str(output), str(tmp_path))


@pytest.mark.parametrize("before", ["", '{"id": "b.png", "error": "none"}\n'])
def test_a_row_goes_on_wherever_it_was_torn(before, tmp_path):
    output, image = tmp_path / "rows.jsonl", tmp_path / '"\\.png'
    Image.new("RGB", (2, 2)).save(image)
    row = json.dumps({"id": str(image)} | ROW, separators=(",", ":"))
    for end in range(len(row) + 1):
        output.write_text(before + row[:end])
        assert run(str(output), str(image)).counts.captioned == (end < len(row))
        assert [each["id"] for each in rows_of(str(output))][-1] == str(image)
        assert output.read_text().startswith(before)


def test_no_link_in_an_output_is_followed(photos, tmp_path):
    victim = tmp_path / "victim"
    for output in ("rows.csv", "rows.parquet", "rows.tar", "rows.jsonl", "texts/"):
        text = next(photos.rglob("*.png")).relative_to(photos).with_suffix(".txt")
        first = f".vignette.{key(str(text)).hex()}.partial"
        partial = tmp_path / (output + first if "/" in output else f".{output}.partial")
        partial.parent.mkdir(exist_ok=True)
        partial.symlink_to(victim)
        victim.write_text("precious")
        run(f"{tmp_path}/{output}", str(photos))
        Image.new("RGB", (9, 9)).save(next(photos.rglob("*.png")))
        run(f"{tmp_path}/{output}", str(photos), again=True)
        check(f"{tmp_path}/{output}", photos)
        assert victim.read_text() == "precious"
        assert not partial.is_symlink()
    for output, ours in (
        ("a.csv", "a.csv"), ("b.csv", "b.csv.rows.jsonl"), ("c.tar", "c.tar"),
        ("d.tar", "d.tar.partial"), ("others/", "others/.vignette.jsonl"),
    ):  # fmt: skip
        victim.write_text("")
        (tmp_path / "others").mkdir(exist_ok=True)
        (tmp_path / ours).symlink_to(victim)
        with pytest.raises(OutputConflict, match=f"{ours} is no regular file"):
            run(f"{tmp_path}/{output}", str(photos))
        assert victim.read_text() == ""


def test_a_row_that_leads_outside_is_refused_and_writes_nothing(photos, tmp_path):
    rows = tmp_path / "texts" / ".vignette.jsonl"
    rows.parent.mkdir()
    for name in ("../escaped.txt", f"{tmp_path}/escaped.txt", "a\0b.txt"):
        rows.write_text(json.dumps({"id": "a.png", "text": name} | ROW) + "\n")
        with pytest.raises(OutputConflict, match=r"lies outside of the output|can't be a file"):
            run(f"{rows.parent}/", str(photos))
    others = {"id": "b.png", "caption": "b", "model": "another"}
    inside = {"id": "a.png", "text": "a.txt"} | ROW
    rows.write_text(json.dumps(inside) + "\n" + json.dumps(others) + "\n")
    with pytest.raises(OutputConflict, match="another model"):
        run(f"{rows.parent}/", str(photos))
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "photos"}
    assert {path.name for path in rows.parent.iterdir()} == {rows.name}


def test_what_is_no_regular_file_is_left_alone(photos, tmp_path):
    os.mkfifo(photos / "000.txt")
    for overwrite in (False, True):
        job = run(f"{photos}/", str(photos), retry=True, overwrite=overwrite)
        assert job.counts.failed == 1
        [error] = [row["error"] for row in rows_of(f"{photos}/") if "error" in row]
        assert error == "000.txt is no regular file"
    for name in ("rows.jsonl", "rows.csv", "rows.tar"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(OutputConflict, match=f"{name} is no regular file"):
            run(f"{tmp_path}/{name}", str(photos))


def test_what_is_called_like_a_file_of_ours_fails_alone(tmp_path):
    archive(tmp_path / "a.tar", {
        ".vignette.partial/x.png": png(), ".vignette.jsonl/x.png": png(), "y.png": png(),
    })  # fmt: skip
    job = run(f"{tmp_path}/texts/", f"{tmp_path}/a.tar")
    assert (job.counts.captioned, job.counts.failed) == (1, 2)
    assert (tmp_path / "texts/y.txt").exists()


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("a.jsonl", "a.jsonl"), ("link.csv", "a.csv"), ("a.tar", "./a.tar"),
        ("a.csv.rows.jsonl", "a.csv"), ("texts/.vignette.jsonl", "texts/"),
    ],
)  # fmt: skip
def test_what_is_read_is_not_written_to(given, output, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "link.csv").symlink_to("a.csv")
    for name in ("a.jsonl", "a.csv", "a.tar", "a.csv.rows.jsonl", "texts/.vignette.jsonl"):
        (tmp_path / name).write_text("image\na.png\n")
    with pytest.raises(OutputConflict, match=f"is read as input .*{given}"):
        run(f"{tmp_path}/{output}", f"{tmp_path}/{given}")
    assert (tmp_path / given).read_text() == "image\na.png\n"
    assert len(list(tmp_path.rglob("*"))) == 7


def archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["rows.tar", "rows.tar.partial"])
@pytest.mark.parametrize(
    "files", [None, {"a.txt": b"mine"}, {"a.json": b'{"mine": 1}'}, {"a.json": b"\xff"}]
)
def test_an_archive_that_is_not_ours_is_kept(name, files, photos, tmp_path):
    if files is None:
        (tmp_path / name).write_text("precious\n")
    else:
        archive(tmp_path / name, files)
    kept = (tmp_path / name).read_bytes()
    with pytest.raises(OutputConflict, match="name another output"):
        run(f"{tmp_path}/rows.tar", str(photos))
    assert (tmp_path / name).read_bytes() == kept


def test_an_archive_goes_on_wherever_its_samples_were_torn(photos, tmp_path):
    output, growing = tmp_path / "rows.tar", tmp_path / "rows.tar.partial"
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tar, "finish", Mock(side_effect=KeyboardInterrupt))
        run(str(output), str(photos))
    whole = growing.read_bytes()
    for end in range(0, len(whole), 300):
        output.unlink(missing_ok=True)
        growing.write_bytes(whole[:end])
        run(str(output), str(photos))
        check(str(output), photos)
        assert not growing.exists()
    growing.write_bytes(whole)  # as if the last run was killed when all was done
    run(str(output), str(photos))
    check(str(output), photos)


def test_samples_of_one_key_stay_apart(photos, tmp_path, monkeypatch):
    images = [file.read_bytes() for file in sorted(photos.iterdir())]
    shards = [tmp_path / f"{number}.tar" for number in range(3)]
    output = tmp_path / "rows.tar"
    for image, shard in zip(images, shards, strict=True):
        archive(shard, {"000.png": image})
        run(str(output), *map(str, shards[: shards.index(shard) + 1]))
    for model in ("words", "another"):
        monkeypatch.setattr(bulk_job, "ABOUT", CaptionSettings(model, {}))
        run(str(output), *map(str, shards), again=True)
        found = dict(members(output))
        assert len(found) == 9
        assert found["000.png"] == images[0]  # whose key it was stays so
        assert {data for name, data in found.items() if name.endswith(".png")} == set(images)
        assert {row["model"] for row in rows_of(str(output))} == {model}


def test_a_member_s_new_name_takes_no_other_s(photos, tmp_path):
    files = {"z.png": (photos / "000.png").read_bytes()}
    files |= {"z.txt": b"new", "z.original.txt": b"old"}
    archive(tmp_path / "in.tar", files)
    run(f"{tmp_path}/rows.tar", f"{tmp_path}/in.tar")
    found = dict(members(tmp_path / "rows.tar"))
    assert (found["z.original.txt"], found["z.original.original.txt"]) == (b"old", b"new")


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.tar", "texts/"])
def test_a_run_that_is_refused_leaves_nothing(name, photos, tmp_path):
    with pytest.raises(NoImages):
        run(f"{tmp_path}/{name}", "nowhere")
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(photos.iterdir())


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_what_is_read_by_url_is_not_written_to(scheme, tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(OutputConflict, match="is read as input"):
        run(f"{tmp_path}/a.jsonl", f"{scheme}://{tmp_path}/a.jsonl")


@pytest.mark.parametrize("url", ["simplecache::file:///dev/zero", "local://{}/pipe"])
def test_what_would_not_end_is_not_fetched(url, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnfitItem):
        fetch(url.format(tmp_path), 10**6)


def test_a_caption_that_was_not_written_over_the_old_one_is_written_later(tmp_path):
    """The row is there, and the file is that of the row before: a full disk, or a kill."""
    files = small_images(tmp_path, 1)
    given = list(map(str, files))
    run(f"{tmp_path}/texts/", *given)
    [text] = (tmp_path / "texts").rglob("*.txt")
    rows = tmp_path / "texts" / ".vignette.jsonl"
    row = json.loads(rows.read_text())
    with rows.open("a") as stream:
        stream.write(json.dumps(row | {"caption": "another"}, separators=(",", ":")) + "\n")
    run(f"{tmp_path}/texts/", *given)
    assert text.read_text() == "another"


def test_a_foreign_text_that_was_to_be_overwritten_is_overwritten_later(tmp_path):
    """A kill between a row and its text."""
    [file] = small_images(tmp_path, 1)
    output = f"{tmp_path}/texts/"
    run(output, str(file))
    [text] = (tmp_path / "texts").rglob("*.txt")
    said = text.read_text()
    text.write_text("somebody else's")
    run(output, str(file))
    assert text.read_text() == "somebody else's"
    run(output, str(file), overwrite=True)
    assert text.read_text() == "somebody else's", "it was written after the caption"
    name = str(text.relative_to(output))
    for begun in ("another.txt", name):  # whose caption did not replace its file's
        for overwrite in (False, True):
            (Path(output) / f".vignette.{key(begun).hex()}.partial").write_text(said)
            os.utime(text, (2**33, 2**33))
            refused = begun == name and not overwrite
            with pytest.raises(OutputConflict, match="--overwrite") if refused else nullcontext():
                run(output, str(file), overwrite=overwrite)
            expected = said if begun == name and overwrite else "somebody else's"
            assert text.read_text() == expected
            assert bool(list(Path(output).glob(".vignette.*partial"))) is refused


@pytest.mark.parametrize("outside", ["../mine.txt", "{}/mine.txt"])
def test_rows_that_name_texts_elsewhere_are_refused(outside, tmp_path):
    [file] = small_images(tmp_path, 1)
    output, mine = tmp_path / "texts", tmp_path / "mine.txt"
    run(f"{output}/", str(file))
    mine.write_text("mine")
    rows = output / ".vignette.jsonl"
    row = json.loads(rows.read_text()) | {"text": outside.format(tmp_path), "caption": "mine"}
    rows.write_text("".join(json.dumps(r) + "\n" for r in (row, row | {"text": "b.txt"})))
    with pytest.raises(OutputConflict, match="outside of the output"):
        run(f"{output}/", str(file), again=True)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("captioned", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tar", "texts/"])
def test_a_shard_that_is_whole_now_leaves_no_error(captioned, name, tmp_path):
    archive(tmp_path / "a.tar", {f"{n}.png": png((n, 0, 0)) for n in range(4)})
    whole = (tmp_path / "a.tar").read_bytes()
    output, shard = f"{tmp_path}/{name}", f"{tmp_path}/a.tar"
    if captioned:
        run(output, shard)
    (tmp_path / "a.tar").write_bytes(whole[:2500])
    broken = run(output, shard)
    assert broken.counts.failed == 1
    (tmp_path / "a.tar").write_bytes(whole)
    mended = run(output, shard)
    assert (mended.counts.failed, mended.counts.failed_before) == (0, 0)
    assert len(rows_of(output)) == 4
    assert not any(row.get("error") for row in rows_of(output))
