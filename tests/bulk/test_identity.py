"""A row is of one image and one question: another of its id is not taken for it."""

import json
import os
from pathlib import Path

import pytest

from server.bulk.inputs.items import Item
from server.bulk.inputs.keys import of_item
from server.bulk.inputs.lists import Columns
from server.bulk.outputs.index import SameId
from tests.bulk.test_safety import archive
from tests.support.bulk_job import Words, rows_of, run, said_of
from tests.support.live import png


def listed(folder: Path, content: bytes, **row: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "1.png").write_bytes(content)
    (folder / "list.jsonl").write_text(json.dumps({"image": "1.png"} | row) + "\n")
    return f"{folder}/list.jsonl"


def test_a_list_elsewhere_has_other_images_of_the_same_ids(tmp_path):
    first, other = (listed(tmp_path / name, name.encode(), sku="1") for name in "bc")
    output, columns = f"{tmp_path}/rows.jsonl", Columns(id="sku")
    run(output, first, columns=columns)
    with pytest.raises(SameId, match=r"has a row of another image or prompt.*--again"):
        run(output, other, columns=columns)
    assert run(output, other, columns=columns, again=True).counts.captioned == 1
    assert [row["caption"] for row in rows_of(output)] == [said_of(b"c")]


def test_what_a_list_names_has_one_row_whichever_lists_are_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        listed(tmp_path / name, name.encode())
    run("rows.jsonl", "b/list.jsonl", "c/list.jsonl")
    for given, captioned in (("cb", 0), ("c", 0), ("abc", 1), ("ac", 0)):
        job = run("rows.jsonl", *(f"{name}/list.jsonl" for name in given))
        assert (job.counts.captioned, job.counts.before) == (captioned, len(given) - captioned)
    assert {row["id"] for row in rows_of("rows.jsonl")} == {"a/1.png", "b/1.png", "c/1.png"}


@pytest.mark.parametrize("way", ["folder", "list", "file://"])
@pytest.mark.parametrize("name", [b"a.png", b"caf\xe9.png", rb"a\x41.png", rb"a\b.png"])
def test_a_file_that_was_replaced_is_captioned_again(name, way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    image = Path("photos") / os.fsdecode(name)
    image.write_bytes(b"x")
    prefix = f"file://{tmp_path}/" if way == "file://" else ""
    Path("list.txt").write_bytes(os.fsencode(f"{prefix}{image}\n"))
    given = "photos" if way == "folder" else "list.txt"
    run("rows.jsonl", given)
    assert run("rows.jsonl", given).counts.before == 1
    image.write_bytes(b"another")
    assert run("rows.jsonl", given, again=True).counts.captioned == 1
    assert [row["caption"] for row in rows_of("rows.jsonl")] == [said_of(b"another")]


def test_a_file_that_can_not_be_looked_at_has_one_row_by_a_folder_and_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("photos/a.png").symlink_to("x" * 300)  # no file has such a name
    Path("photos/b.png").write_bytes(b"b")
    Path("list.txt").write_text("photos/a.png\nphotos/b.png\n")
    job = run("rows.jsonl", "photos", "list.txt", ordered=True)
    assert (job.counts.captioned, job.counts.failed) == (1, 1)
    assert len(rows_of("rows.jsonl")) == 2


def test_a_folder_and_a_list_call_an_image_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    names = [os.fsdecode(name) for name in (b"caf\xe9.png", rb"caf\xe9.png", b"a.png")]
    for name in names:
        (Path("photos") / name).write_bytes(os.fsencode(name))
    Path("list.txt").write_bytes(b"".join(os.fsencode(f"photos/{name}\n") for name in names))
    assert run("rows.jsonl", "photos", "list.txt").counts.captioned == 3


def test_an_id_that_failed_is_of_one_image_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = listed(tmp_path / "a", b"", sku="7")
    (tmp_path / "a" / "1.png").unlink()
    output, columns = "rows.jsonl", Columns(id="sku")
    assert run(output, given, columns=columns).counts.failed == 1
    for name in ("2.png", "3.png"):
        (tmp_path / "a" / name).write_bytes(png())
        with Path(given).open("w" if name == "2.png" else "a") as stream:
            stream.write(json.dumps({"image": name, "sku": "7"}) + "\n")
    with pytest.raises(SameId, match="two inputs are called 7"):
        run(output, given, columns=columns)


def test_a_row_of_a_list_that_was_mended_leaves_no_error(tmp_path):
    given, output = listed(tmp_path / "a", b"x"), f"{tmp_path}/rows.jsonl"
    Path(given).write_text('broken\n{"image": "1.png"}\n')
    assert run(output, given).counts.failed == 1
    Path(given).write_text('{"image": "2.png"}\n{"image": "1.png"}\n')
    (tmp_path / "a" / "2.png").write_bytes(b"y")
    job = run(output, given)
    assert (job.counts.captioned, job.counts.failed_before) == (1, 0)
    assert len(rows_of(output)) == 2


def test_an_image_that_is_none_any_more_does_not_keep_its_caption(tmp_path):
    output, shard = f"{tmp_path}/rows.jsonl", tmp_path / "a.tar"
    archive(shard, {"x.png": png()})
    run(output, str(shard))
    archive(shard, {"x.png": bytes(10**7 + 1)})
    with pytest.raises(SameId, match=r"has a caption, but no image now.*--again"):
        run(output, str(shard))
    for captioned in (True, False):  # then its row is an error, and left
        job = run(output, str(shard), again=True)
        assert (job.counts.failed, job.counts.before) == (int(captioned), int(not captioned))
        assert ["more than" in row["error"] for row in rows_of(output)] == [True]


def test_an_image_that_the_list_holds_is_known_by_its_content(tmp_path):
    given, output = tmp_path / "list.txt", f"{tmp_path}/rows.jsonl"
    given.write_text("data:image/png;base64,eHg=\n")
    run(output, str(given))
    assert run(output, str(given)).counts.before == 1
    given.write_text("data:image/png;base64,eXk=\n")
    with pytest.raises(SameId, match="another image"):
        run(output, str(given))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tar", "texts/"])
def test_a_shard_of_the_same_name_has_other_images(name, tmp_path):
    shard, output = tmp_path / "a.tar", f"{tmp_path}/{name}"
    archive(shard, {"a.png": png((1, 0, 0)), "b.png": png((2, 0, 0))})
    run(output, str(shard))
    assert run(output, str(shard)).counts.before == 2
    archive(shard, {"a.png": png((3, 0, 0)), "b.png": png((2, 0, 0))})
    with pytest.raises(SameId, match="has a row of another image"):
        run(output, str(shard))
    assert run(output, str(shard), again=True).counts.captioned == 1
    captions = {row["caption"] for row in rows_of(output)}
    assert captions == {said_of(png((3, 0, 0))), said_of(png((2, 0, 0)))}


def test_a_question_that_was_changed_is_another(tmp_path):
    output, columns = f"{tmp_path}/rows.jsonl", Columns(prompt="question")
    given = listed(tmp_path / "a", b"x", question="how many")
    run(output, given, columns=columns)
    assert run(output, given, columns=columns).counts.before == 1
    Path(given).write_text(json.dumps({"image": "1.png", "question": "which colour"}) + "\n")
    with pytest.raises(SameId):
        run(output, given, columns=columns)
    run(output, given, columns=columns, again=True)
    assert [row["prompt"] for row in rows_of(output)] == ["which colour"]


def test_two_questions_of_one_image_need_ids(tmp_path):
    output, columns = f"{tmp_path}/rows.jsonl", Columns(prompt="question")
    given = listed(tmp_path / "a", b"x", question="how many")
    with Path(given).open("a") as stream:
        stream.write(json.dumps({"image": "1.png", "question": "which colour"}) + "\n")
    with pytest.raises(SameId, match=r"two inputs are called .*1.png.*--id-column"):
        run(output, given, columns=columns)
    with pytest.raises(SameId, match="two inputs"):
        run(f"{tmp_path}/others.jsonl", given, columns=columns, again=True)


def test_two_inputs_of_one_id_do_not_take_each_other_s_row(tmp_path):
    output, columns = f"{tmp_path}/rows.jsonl", Columns(prompt="question")
    given = listed(tmp_path / "a", b"x", question="how many")
    run(output, given, columns=columns)
    with Path(given).open("a") as stream:
        stream.write(json.dumps({"image": "1.png", "question": "which colour"}) + "\n")
    with pytest.raises(SameId, match="two inputs"):
        run(output, given, columns=columns, again=True)
    assert [row["prompt"] for row in rows_of(output)] == ["how many"]


def test_a_list_is_known_again_from_another_folder_and_through_a_link(tmp_path, monkeypatch):
    listed(tmp_path / "data", b"x", sku="1")
    (tmp_path / "link").symlink_to("data")
    output, columns = f"{tmp_path}/rows.jsonl", Columns(id="sku")
    monkeypatch.chdir(tmp_path / "data")
    run(output, "list.jsonl", columns=columns)
    monkeypatch.chdir(tmp_path)
    for given in ("data/list.jsonl", "./data/list.jsonl", "link/list.jsonl"):
        assert run(output, given, columns=columns).counts.before == 1
    assert rows_of(output)[0]["path"] == f"{tmp_path}/data/1.png"


@pytest.mark.parametrize(
    "signed",
    [
        "https://host/{}.png?a=1&X-Amz-Signature={}&X-Amz-Date=7#x",
        "https://host/{}.png?sv=2024-05-04&st={}&sig=x",
        "gs://host/{}.png?Expires={}&Signature=x",
        "https://host/{}.png?AWSAccessKeyId=a&Signature={}&x-amz-security-token=b&Expires=1",
    ],
)
def test_a_signature_of_a_url_is_not_what_it_names(signed):
    first, again, other = (
        of_item(Item("sku", signed.format(*parts))) for parts in ("a1", "a2", "b1")
    )
    assert first == again != other


@pytest.mark.parametrize(
    "url",
    [
        "https://host/image?st={}",
        "https://host/image?policy={}&sv=1",
        "https://host/a.mp4?x-oss-process=video/snapshot,t_{}&x-oss-signature=a&x-oss-date=b",
        "https://host/a?layer=3&layer={}&layer=0",
        "s3://host/a#{}",
    ],
)
def test_a_parameter_without_a_signature_names_another_image(url):
    assert of_item(Item("sku", url.format(1))) != of_item(Item("sku", url.format(2)))


@pytest.mark.parametrize("sku", ["https://[", "a\0/b.png"])
def test_an_id_may_look_like_a_location_that_is_none(sku, tmp_path):
    given = listed(tmp_path / "a", b"x", sku=sku)
    output, columns = f"{tmp_path}/rows.jsonl", Columns(id="sku")
    run(output, given, columns=columns)
    assert run(output, given, columns=columns).counts.before == 1
    bare = [Item(sku, sku), Item(sku, b"x")]
    assert len({of_item(each) for each in bare}) == 2


def test_an_error_row_is_left_until_it_is_retried(tmp_path):
    shard, output = tmp_path / "a.tar", f"{tmp_path}/rows.jsonl"
    archive(shard, {"a.png": png((1, 0, 0))})
    assert run(output, str(shard), columns=Columns(image="jpg")).counts.failed == 1
    left = run(output, str(shard), again=True).counts
    assert (left.before, left.ended) == (1, 0)
    assert run(output, str(shard), retry=True).counts.captioned == 1


def test_ids_that_change_places_lose_nothing_for_good(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    given, texts, columns = tmp_path / "list.jsonl", tmp_path / "texts", Columns(id="id")

    def pairs(*images: str) -> str:
        rows = ({"id": str(n), "image": f"{name}.png"} for n, name in enumerate(images))
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(given)

    run(f"{texts}/", pairs("a", "b"), columns=columns)
    run(f"{texts}/", pairs("b", "a"), columns=columns, again=True)
    run(f"{texts}/", pairs("b", "a"), columns=columns, again=True, retry=True)
    assert {row["id"]: row["text"] for row in rows_of(f"{texts}/")} == {"0": "b.txt", "1": "a.txt"}
    assert [(texts / f"{name}.txt").read_text() for name in "ab"] == [said_of(b"a"), said_of(b"b")]
    run(f"{texts}/", pairs("b", "b"), columns=columns, again=True)
    assert not (texts / "a.txt").exists(), "no row has it any more"


def test_an_image_that_failed_leaves_no_text_of_the_one_before(tmp_path):
    photo, texts = tmp_path / "1.png", tmp_path / "texts"
    photo.write_bytes(b"owl")
    run(f"{texts}/", str(photo))
    [text] = texts.rglob("*.txt")
    photo.unlink()
    photo.symlink_to("nowhere")
    assert run(f"{texts}/", str(photo), again=True, retry=True).counts.before == 1, "it is away"
    photo.unlink()
    photo.write_bytes(b"x" * (10**7 + 1))
    assert run(f"{texts}/", str(photo), again=True).counts.failed == 1
    assert not text.exists()
    photo.write_bytes(b"cats")
    assert run(f"{texts}/", str(photo), again=True, retry=True).counts.captioned == 1
    assert text.read_text() == said_of(b"cats")


def test_a_run_that_was_killed_before_a_text_was_removed_does_so_later(tmp_path):
    photo, texts = tmp_path / "1.png", tmp_path / "texts"
    photo.write_bytes(b"owl")
    run(f"{texts}/", str(photo))
    [text] = texts.rglob("*.txt")
    rows = texts / ".vignette.jsonl"
    row = {"id": str(photo), "error": "broken", "text": text.relative_to(texts).as_posix()}
    with rows.open("a") as stream:
        stream.write(json.dumps(row, separators=(",", ":")) + "\n")
    run(f"{texts}/", str(photo))
    assert not text.exists()


def test_a_file_that_is_replaced_while_it_is_captioned_is_captioned_again(tmp_path, monkeypatch):
    photo, output = tmp_path / "1.png", f"{tmp_path}/rows.jsonl"
    photo.write_bytes(b"owl")

    def caption(self, image, prompt, real=Words.caption):
        photo.write_bytes(b"cats, two")
        return real(self, image, prompt)

    with monkeypatch.context() as patch:
        patch.setattr(Words, "caption", caption)
        run(output, str(photo))
    run(output, str(photo), again=True)
    assert [row["caption"] for row in rows_of(output)] == [said_of(b"cats, two")]


def test_a_list_may_name_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("1.png").write_bytes(b"owl")
    Path("list.txt").write_text("1.png\nlist.txt\nnot there.png\n")
    found = []
    for _ in range(3):
        run("rows.jsonl", "list.txt")
        found.append(sorted(row["id"] for row in rows_of("rows.jsonl")))
    assert found == [["1.png", "list.txt", "not there.png"]] * 3


def test_images_of_equal_names_in_two_lists_have_texts_of_their_own(tmp_path):
    given = [listed(tmp_path / name, name.encode()) for name in "bc"]
    run(f"{tmp_path}/texts/", *given)
    texts = {path.read_text() for path in (tmp_path / "texts").rglob("*.txt")}
    assert texts == {said_of(b"b"), said_of(b"c")}
