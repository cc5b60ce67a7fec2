"""Folders of images into lines of captions: all of them, whatever is wrong with some."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from runtime.errors import InvalidRequest
from runtime.model.manifest import EXACT, read
from runtime.offline.files import caption_files
from runtime.offline.jsonl import CaptionLines, state
from runtime.planning.config import EngineConfig
from server.bulk import main
from tests.conftest import DEMO, SAMPLES
from tests.fakes import FakeRunner, fake_engine

SAID = {
    name: said["caption"]
    for name, said in json.loads((SAMPLES / "captions.json").read_text()).items()
}
MADE_BY = {
    "model": "vignette-demo", "engine": read(DEMO).fingerprint, "precision": "fp32/fp32/float32",
}  # fmt: skip
PHOTOS = {"owl.png", "cats.png", "donuts.png", "umbrella.png"}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four samples, one of them in a folder below; what is no image is left alone."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in PHOTOS:
        shutil.copy(SAMPLES / name, folder)
    (folder / "owl.png").rename(folder / "more" / "owl.PNG")
    (folder / "notes.txt").write_text("not an image, and not named like one")
    return folder


def run(*arguments: Path | str) -> int:
    given = [*map(str, arguments), "--engine", str(DEMO), "--provider", "cpu"]
    return main([*given, "--precision", EXACT])


def entries(output: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {Path(line["file"]).name.lower(): line for line in lines}
    assert len(found) == len(lines)
    return found


def test_a_folder_is_captioned_with_those_below_it(photos, tmp_path):
    output = tmp_path / "captions.jsonl"
    assert run(photos, photos / "cats.png", "--output", output) == 0
    found = entries(output)
    assert {name: line["caption"] for name, line in found.items()} == {n: SAID[n] for n in PHOTOS}
    assert found["owl.png"]["file"] == str(photos / "more" / "owl.PNG")


def test_lines_go_to_standard_output_and_answer_a_prompt(capfd):
    assert run(SAMPLES / "cats.png", "--prompt", "how many cats are there") == 0
    line = json.loads(capfd.readouterr().out)
    assert (line["prompt"], line["caption"]) == ("how many cats are there", "two")


def test_beams_and_scores_are_in_the_lines(capfd):
    flags = ("--num-beams", "3", "--n", "2", "--early-stopping", "never")
    assert run(SAMPLES / "owl.png", *flags) == 0
    line = json.loads(capfd.readouterr().out)
    assert (line["num_beams"], line["n"], line["early_stopping"]) == (3, 2, "never")
    assert line["caption"] == SAID["owl.png"] == line["captions"][0]["caption"]
    scores = [each["score"] for each in line["captions"]]
    assert len(scores) == 2 and max(scores) < 0
    assert run(SAMPLES / "owl.png", "--top-p", "0.5") == 1
    assert "top_p has no effect without a temperature" in capfd.readouterr().err


def test_a_file_that_is_no_image_fails_alone(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    (photos / "cats.png").write_bytes(b"GIF")
    (photos / "link.jpg").symlink_to("nowhere")
    assert run(photos, "--output", output) == 1
    found = entries(output)
    assert "not an image" in found["cats.png"]["error"]
    assert "No such file" in found["link.jpg"]["error"]
    assert {name for name, line in found.items() if "caption" in line} == PHOTOS - {"cats.png"}
    assert "3 captioned, 2 failed" in capfd.readouterr().err


def test_the_same_command_goes_on_after_a_kill(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    cats = photos / "cats.png"
    lines = (
        {"file": str(cats), "caption": "kept as it is", **state(cats)},
        {"file": "elsewhere.png", "error": "not of this run"},
        {"file": str(photos / "donuts.png"), "error": "tried again"},
        {"file": str(photos / "umbrella.png"), "caption": "cut off"},
    )
    output.write_text("\n".join(json.dumps(line | MADE_BY) for line in lines)[:-4])
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    assert run(photos, "--output", link) == 0
    found = entries(output)
    assert found.pop("elsewhere.png")["error"] == "not of this run"
    captions = {name: line["caption"] for name, line in found.items()}
    assert captions == {n: SAID[n] for n in PHOTOS} | {"cats.png": "kept as it is"}
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.jsonl", "link.jsonl", "photos"]
    assert "3 captioned, 1 before, 0 failed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("file,caption\na.png,an owl\n", "line 1, is no caption"),
        ('{"file": "a.png", "model": "git-base", "caption": "a cat"}\n', "another model"),
        *(
            (json.dumps(MADE_BY | {"file": "a", "caption": "b", key: value}) + "\n",
             f"another {key}")
            for key, value in (("prompt", "how many"), ("max_new_tokens", 3), ("engine", "x"),
                               ("precision", "int8/int8/int8"))
        ),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_left_alone(
    content, complaint, photos, tmp_path, capfd
):
    output = tmp_path / "precious.jsonl"
    output.write_text(content)
    assert run(photos, "--output", output) == 1
    assert complaint in capfd.readouterr().err
    assert output.read_text() == content


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{empty}"], "holds no images"),
        ([str(SAMPLES), "--max-new-tokens", "1000"], "max_new_tokens is 1000"),
        ([str(SAMPLES), "--output", "{empty}/no/such/captions.jsonl"], "No such file or directory"),
    ],
)
def test_what_can_not_be_done_is_said(arguments, complaint, tmp_path, capfd):
    assert run(*(a.replace("{empty}", str(tmp_path)) for a in arguments)) == 1
    said = capfd.readouterr()
    assert complaint in said.err
    assert not said.out


def test_two_runs_do_not_write_to_one_file(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    with CaptionLines.resume(output, MADE_BY, ()) as first:
        assert run(photos, "--output", output) == 1
        assert "another run writes" in capfd.readouterr().err
        first.write(Path("a.png"), OSError("gone"))
    assert json.loads(output.read_text())["error"] == "gone"
    assert run(photos, "--output", output) == 0


def test_what_was_cut_off_and_what_was_skipped_is_told(photos, capfd):
    (photos / "phone.HEIC").touch()
    assert run(photos, "--max-new-tokens", "2") == 0
    said = capfd.readouterr()
    assert {json.loads(line)["finish_reason"] for line in said.out.splitlines()} == {"length"}
    assert "4 captioned, 4 of them cut off (see --max-new-tokens), 0 failed" in said.err
    assert "skipped what is not named like an image: 1 .txt, 1 .heic" in said.err


def test_a_step_that_fails_costs_no_more_than_the_image_it_fails_on(tmp_path):
    class Allergic(FakeRunner):
        def decode(self, tokens, fed, forced=(), candidates=1):
            if any(self.cache[row][0] == 3 * 16 * 7 for row in range(len(tokens))):
                raise RuntimeError("no kernel")
            return super().decode(tokens, fed, forced, candidates)

    engine = fake_engine(EngineConfig(slots=4))
    engine.runner = Allergic()
    files = small_images(tmp_path, 20)
    outcomes = dict(caption_files(engine, files))
    assert len(outcomes) == 20
    [failed] = [file for file, outcome in outcomes.items() if isinstance(outcome, Exception)]
    assert failed.name == "007.png"
    expected = fake_engine().generate([file.read_bytes() for file in files])
    for file, caption in zip(files, expected, strict=True):
        if file != failed:
            assert outcomes[file].token_ids == caption.token_ids


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"\xe9t\xe9.png")
    shutil.copy(SAMPLES / "owl.png", tmp_path / name)
    output = tmp_path / "captions.jsonl"
    for _ in range(2):  # the second finds it done
        assert run(tmp_path / name, "--output", output) == 0
        [line] = output.read_text("utf-8").splitlines()
        written = json.loads(line)["file"]
        back = written.encode("latin-1", "backslashreplace").decode("unicode_escape")
        assert os.fsencode(str(tmp_path / name)).endswith(back.encode("latin-1")[-9:])
        assert written.endswith(r"\xe9t\xe9.png")


def test_a_caption_is_for_one_content_and_one_way_of_making_it(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    assert run(photos, "--output", output) == 0
    shutil.copy(photos / "donuts.png", photos / "cats.png")
    capfd.readouterr()
    assert run(photos, "--output", output) == 1
    assert "cats.png was captioned with another content" in capfd.readouterr().err
    assert run(photos, "--output", output, "--again") == 0
    assert "1 captioned, 3 before" in capfd.readouterr().err
    assert entries(output)["cats.png"]["caption"] == SAID["donuts.png"]
    assert run(photos, "--output", output, "--max-new-tokens", "2") == 1
    assert run(photos, "--output", output, "--max-new-tokens", "2", "--again") == 0
    assert {line["finish_reason"] for line in entries(output).values()} == {"length"}


@pytest.mark.parametrize("name", ["captions.csv", "captions.parquet"])
def test_what_is_not_written_is_refused(name, photos, tmp_path, capfd):
    assert run(photos, "--output", tmp_path / name) == 1
    assert "only lines of JSON" in capfd.readouterr().err


def test_hidden_folders_are_left_out(photos, tmp_path):
    hidden = photos / ".thumbnails"
    hidden.mkdir()
    shutil.copy(photos / "cats.png", hidden / "small.png")
    shutil.copy(photos / "cats.png", photos / "._cats.png")
    output = tmp_path / "captions.jsonl"
    assert run(photos, "--output", output) == 0
    assert set(entries(output)) == PHOTOS


def small_images(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{number:03}.png" for number in range(count)]
    for number, file in enumerate(files):
        Image.new("RGB", (4, 4), (number, number, number)).save(file)
    return files


def test_only_as_many_are_held_as_keep_the_engine_busy(tmp_path):
    files, taken = small_images(tmp_path, 100), []
    engine = fake_engine(EngineConfig(slots=4))
    outcomes = caption_files(engine, (taken.append(file) or file for file in files))
    ended = []
    for file, _ in outcomes:
        ended.append(file)
        assert len(taken) - len(ended) <= 4 * 4  # slots: running, and as many decoded or told
    assert sorted(ended) == files


def test_a_caller_that_has_enough_leaves_the_engine_free(tmp_path):
    engine = fake_engine(EngineConfig(slots=4))
    outcomes = caption_files(engine, small_images(tmp_path, 30))
    next(outcomes)
    outcomes.close()
    assert engine.scheduler.idle
    assert len(list(caption_files(engine, small_images(tmp_path, 30)))) == 30


def test_a_model_of_several_frames_is_refused_at_once(tmp_path):
    engine = fake_engine()
    engine.manifest = replace(engine.manifest, sizes=replace(engine.manifest.sizes, frames=6))
    with pytest.raises(InvalidRequest, match="several frames"):
        next(caption_files(engine, small_images(tmp_path, 1)))
