"""Rows in every form: each image exactly one, whatever is killed when."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from server.bulk.inputs.items import NoWay
from server.bulk.inputs.lists import Columns
from server.bulk.outputs.base import OutputConflict
from server.bulk.outputs.opening import open_output
from server.bulk.outputs.tables import TableOutput
from tests.support.bulk_job import check, members, rows_of, run, said_of

KINDS = ("rows.jsonl", "rows.csv", "rows.parquet", "rows.tar", "texts/")
KILLS = int(os.environ.get("KILLS", "5"))  # of each kind of output


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    for number in range(40):
        file = folder / f"{number % 3}" / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(file)
    return folder


@pytest.fixture(params=KINDS)
def output(request, tmp_path) -> str:
    return f"{tmp_path}/{request.param}"


def test_each_image_has_one_row_that_says_all_there_is(output, photos):
    job = run(output, str(photos))
    assert (job.counts.captioned, job.counts.failed, job.counts.before) == (40, 0, 0)
    check(output, photos)
    row = rows_of(output)[0]
    assert (row["model"], float(row["score"]), row["finish_reason"]) == ("words", -0.5, "stop")
    settings = row["settings"]
    assert (json.loads(settings) if isinstance(settings, str) else settings) == {"engine": "none"}
    left = {path.name for path in Path(output).parent.iterdir()}
    assert left == {"photos", Path(output).name}


def test_a_run_given_again_does_what_is_new(output, photos):
    run(output, str(photos / "0"))
    job = run(output, str(photos))
    assert (job.counts.captioned, job.counts.before) == (26, 14)
    check(output, photos)
    before = Path(output).stat().st_mtime_ns
    assert run(output, str(photos)).counts.before == 40
    assert Path(output).stat().st_mtime_ns == before


def test_failures_are_rows_and_are_tried_alone(output, photos):
    file = next(photos.rglob("*.png"))
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("nowhere")
    job = run(output, str(photos), wrong=("one", "two"))
    assert (job.counts.captioned, job.counts.failed) == (39, 3)
    errors = {row["id"]: row["error"] for row in rows_of(output) if row.get("error")}
    assert errors.pop(str(file)).startswith("[Errno 2] No such file")
    assert errors == {"one": "one", "two": "two"}
    file.unlink()
    file.write_bytes(content)
    assert run(output, str(photos)).counts.ended == 0
    job = run(output, str(photos), retry=True)
    assert (job.counts.captioned, job.counts.before) == (1, 39)
    rows = rows_of(output)
    assert len(rows) == 42
    assert [row["caption"] for row in rows if row["id"] == str(file)] == [said_of(content)]


@pytest.mark.parametrize("done", [
    Path.unlink, lambda path: path.rename(f"{path}.old"),
    lambda path: (path.rename(f"{path}.old"), path.write_text("mine\n")),
])  # fmt: skip
def test_rows_that_are_taken_away_meanwhile_are_missed(done, photos, tmp_path):
    output = tmp_path / "rows.jsonl"
    with pytest.raises(OutputConflict, match=r"rows.jsonl was removed, moved or changed"):
        run(f"{output}", str(photos), begun=lambda: done(output))
    assert not output.exists() or output.read_text() == "mine\n"


@pytest.mark.parametrize("kind", [("rows.jsonl", ""), ("rows.csv", ".rows.jsonl"),
                                  ("rows.parquet", ".rows.jsonl")])  # fmt: skip
def test_rows_that_are_cut_off_meanwhile_are_missed(kind, photos, tmp_path, monkeypatch):
    name, growing = kind
    output = f"{tmp_path}/{name}"
    with monkeypatch.context() as killed:  # before its end
        killed.setattr(TableOutput, "finish", lambda output, index: None)
        run(output, str(photos / "0"))
    with pytest.raises(OutputConflict, match="give the command again"):
        run(output, str(photos), begun=lambda: os.truncate(output + growing, 0))
    run(output, str(photos))
    check(output, photos)


def test_an_image_may_be_called_as_the_error_of_a_list_that_breaks_off(photos, tmp_path):
    rows = [{"image": str(file), "id": file.stem} for file in photos.rglob("*.png")]
    list_ = tmp_path / "list.jsonl"
    rows.append({"image": "gone.png", "id": f"{list_}#end"})
    list_.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for failed, before in ((1, 0), (0, 1)):
        job = run(f"{tmp_path}/rows.jsonl", str(list_), columns=Columns(id="id"))
        assert (job.counts.failed, job.counts.failed_before) == (failed, before)
        assert len(rows_of(f"{tmp_path}/rows.jsonl")) == 41


def test_an_image_called_so_keeps_its_row_where_its_path_is_its_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (5, 5)).save("a.png")
    Path("x.txt").write_text("a.png\nx.txt#end\n")
    for failed, before in ((1, 0), (0, 1), (0, 1)):
        job = run("rows.jsonl", "x.txt")
        assert (job.counts.failed, job.counts.failed_before) == (failed, before)
        assert len(rows_of("rows.jsonl")) == 2


def test_a_row_that_is_called_as_a_folder_before_it_stays(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos.parent)
    Path("list.txt").write_text("photos/1\n")
    for failed, before in ((1, 0), (1, 0), (1, 0)):
        job = run("rows.jsonl", "photos", "list.txt")
        assert (job.counts.failed, job.counts.failed_before) == (failed, before)
        assert len([row for row in rows_of("rows.jsonl") if row["id"] == "photos/1"]) == 1


def test_a_folder_that_can_be_read_again_loses_its_error(photos, tmp_path, monkeypatch):
    closed, output, listed = photos / "1", f"{tmp_path}/rows.jsonl", Path.iterdir

    def iterdir(folder):
        if folder == closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", iterdir)
        assert run(output, str(photos)).counts.failed == 1
    job = run(output, str(photos))
    assert (job.counts.failed, job.counts.failed_before, job.counts.captioned) == (0, 0, 13)
    assert str(closed) not in {row["id"] for row in rows_of(output)}
    check(output, photos)


def test_what_changed_is_captioned_anew(output, photos):
    run(output, str(photos))
    file = next(photos.rglob("*.png"))
    Image.new("RGB", (5, 5)).save(file)
    with pytest.raises(OutputConflict, match=f"{file} was captioned with another content"):
        run(output, str(photos))
    if (private := Path(output)).is_file():
        private.chmod(0o600)
    assert run(output, str(photos), again=True).counts.captioned == 1
    check(output, photos)
    assert private.is_dir() or private.stat().st_mode & 0o777 == 0o600


def test_an_image_of_a_list_is_known_again_by_where_it_is(output, photos, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"another")
    shutil.copy(photos / "0" / "000.png", photos / "x.png")
    (photos / "list.txt").write_text("x.png\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(output, f"{photos}/list.txt")
    Image.new("RGB", (5, 5)).save(photos / "x.png")
    with pytest.raises(OutputConflict, match=r"x.png was captioned with another content"):
        run(output, f"{photos}/list.txt")
    assert run(output, f"{photos}/list.txt", again=True).counts.captioned == 1


def test_no_run_goes_on_where_other_things_are(output, photos):
    if output.endswith("/"):
        Path(output).mkdir()
        (Path(output) / ".vignette.jsonl").write_text('{"file": "x"}\n')
    elif output.endswith(".tar"):
        with tarfile.open(output, "w") as archive:
            archive.add(photos / "0", "0")
    elif output.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), output)
    else:
        Path(output).write_text("name,said\na.png,an owl\n")
    kept = Path(output).stat().st_size
    with pytest.raises(OutputConflict, match="name another output"):
        run(output, str(photos))
    assert Path(output).stat().st_size == kept


def test_a_shard_keeps_its_samples(photos, tmp_path):
    run(f"{tmp_path}/first.tar", str(photos))
    keys = {name.partition(".")[0] for name, _ in members(tmp_path / "first.tar")}
    assert len(keys) == 40
    run(f"{tmp_path}/second.tar", f"{tmp_path}/first.tar")
    second = dict(members(tmp_path / "second.tar"))
    for name, content in members(tmp_path / "first.tar"):
        key, _, extension = name.partition(".")
        kept = name if extension == "png" else f"{key}.original.{extension}"
        assert second[kept] == content
    assert len(second) == 40 * 5


def test_no_text_is_overwritten_that_somebody_else_wrote(photos, tmp_path):
    mine = photos / "0" / "000.txt"
    mine.write_text("what I wrote")
    (photos / "0" / "000.jpg").write_bytes((photos / "0" / "000.png").read_bytes())
    job = run(f"{photos}/", str(photos))
    assert mine.read_text() == "what I wrote"
    assert job.counts.failed == 2
    errors = [row["error"] for row in rows_of(f"{photos}/") if "error" in row]
    assert all("0/000.txt is there, and not written by this" in error for error in errors)
    mine.unlink()
    job = run(f"{photos}/", str(photos), retry=True)
    assert (job.counts.captioned, job.counts.failed) == (1, 1)
    [error] = [row["error"] for row in rows_of(f"{photos}/") if "error" in row]
    assert "0/000.txt has the caption of" in error
    (photos / "1" / "001.txt").write_text("edited")
    run(f"{photos}/", str(photos), again=True, overwrite=True)
    assert (photos / "1" / "001.txt").read_text() == "edited"  # rows that exist are kept


def test_no_text_lands_outside(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "elsewhere")
    image = tmp_path / "in" / "link" / "a.png"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(image)
    assert run(f"{tmp_path}/texts/", f"{tmp_path}/in").counts.failed == 1
    assert not list((tmp_path / "elsewhere").iterdir())


def test_names_that_no_output_can_take_fail_alone(output, photos, tmp_path):
    """In shards and lists of strangers; and a run that is given again finds all done."""
    image = next(photos.rglob("*.png")).read_bytes()
    names = (".", "/", "x" * 300, "a\udcffb", "d", "d/e", "../../f", "/g")
    with tarfile.open(tmp_path / "hostile.tar", "w", errors="surrogateescape") as archive:
        for name in names:
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    ids = ["a\0b.png", "a\ud800.png", "c" * 5000]
    hostile = "".join(json.dumps({"image": each}) + "\n" for each in ids) + "[" * 100_000
    (tmp_path / "hostile.jsonl").write_text(hostile)
    given = f"{tmp_path}/hostile.tar", f"{tmp_path}/hostile.jsonl"
    told = run(output, *given).counts
    assert told.captioned + told.failed == len(names) + len(ids) + 1
    assert told.failed >= len(ids) + 1
    assert run(output, *given).counts.before == told.ended
    if output.endswith(".tar"):
        assert not any(name.startswith(("/", "..")) for name, _ in members(Path(output)))


def test_ids_of_any_characters_have_their_texts(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (2, 2), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    given, output = tmp_path / "list.jsonl", tmp_path / "texts"
    ids = {"a.png": "x\0y", "b.png": "x"}
    given.write_text(
        "".join(json.dumps({"image": file, "name": name}) + "\n" for file, name in ids.items())
    )
    asked = {"columns": Columns(id="name")}
    assert run(f"{output}/", str(given), **asked).counts.captioned == 2
    texts = {file: file.read_bytes() for file in output.rglob("*.txt")}
    assert sorted(texts.values()) == sorted(
        said_of((tmp_path / file).read_bytes()).encode() for file in ids
    )
    for file in texts:
        file.unlink()  # as if the run had been killed before it wrote them
    assert run(f"{output}/", str(given), **asked).counts.before == 2
    assert {file: file.read_bytes() for file in output.rglob("*.txt")} == texts


def test_equal_images_share_a_row_s_caption_over_runs(photos, tmp_path):
    output = f"{tmp_path}/rows.jsonl"
    run(output, str(photos / "0"), once=True)
    shutil.copy(photos / "0" / "000.png", photos / "copy.png")
    job = run(output, str(photos / "copy.png"), once=True)
    assert job.counts.captioned == 1
    assert job.kept.get(f"{rows_of(output)[-1]['sha256']} ") is not None


def test_a_run_that_is_killed_goes_on_with_no_row_lost_or_doubled(output, photos):
    for number in range(300):
        Image.new("RGB", (3, 3), (number % 256, number // 256, 0)).save(photos / f"{number}.png")
    command = [sys.executable, "-m", "tests.support.bulk_job", str(KILLS), output, str(photos)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{KILLS} killed\n"
    run(output, str(photos))
    check(output, photos)


def test_a_missing_package_is_told_before_anything_is_captioned(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(NoWay, match=r"install vignette with the extra \[bulk\]"):
        open_output(str(tmp_path / "captions.parquet"), overwrite=False)
