"""`vignette caption`: all images captioned, whatever is wrong with some, and none twice."""

import json
import os
import shutil
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from runtime.model.manifest import EXACT, read
from runtime.model.preprocess import MAX_PIXELS
from runtime.planning.config import EngineConfig
from server.bulk.captioners import captioning
from server.bulk.captioners.captioning import Captioning, CaptioningOptions
from server.bulk.captioners.engine import EngineSetup
from server.bulk.captioners.local import LocalCaptioner
from server.bulk.command import main
from server.bulk.inputs.folders import restored
from server.bulk.inputs.items import ScoredCaption
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts
from server.bulk.outputs.lines import Lines
from tests.support.fakes import allergic_engine, fake_engine, fake_folder, fake_worker
from tests.support.live import small_images
from tests.support.paths import DEMO, SAMPLES

SAID = {
    name: said["caption"]
    for name, said in json.loads((SAMPLES / "captions.json").read_text()).items()
}
MADE_BY = {
    "model": "vignette-demo",
    "settings": {"engine": read(DEMO).fingerprint, "precision": "fp32/fp32/float32"},
}
PHOTOS = {"owl.png", "cats.png", "donuts.png", "umbrella.png"}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four samples, one of them in a subfolder, and a file that is no image."""
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
    found = {Path(line["id"]).name.lower(): line for line in lines}
    assert len(found) == len(lines)
    return found


def test_a_folder_is_captioned_with_those_below_it(photos, tmp_path):
    output = tmp_path / "captions.jsonl"
    assert run(photos, photos / "cats.png", "--output", output) == 0
    found = entries(output)
    assert {name: line["caption"] for name, line in found.items()} == {n: SAID[n] for n in PHOTOS}
    assert found["owl.png"]["id"] == str(photos / "more" / "owl.PNG")


def test_lines_go_to_standard_output_and_answer_a_prompt(capfd):
    assert run(SAMPLES / "cats.png", "--prompt", "how many cats are there") == 0
    line = json.loads(capfd.readouterr().out)
    assert (line["prompt"], line["caption"]) == ("how many cats are there", "two")


def test_beams_and_scores_are_in_the_lines(capfd):
    flags = ("--num-beams", "3", "--n", "2", "--early-stopping", "never")
    assert run(SAMPLES / "owl.png", *flags) == 0
    line = json.loads(capfd.readouterr().out)
    asked = line["settings"]
    assert (asked["num_beams"], asked["n"], asked["early_stopping"]) == (3, 2, "never")
    assert line["caption"] == SAID["owl.png"] == line["captions"][0]["caption"]
    scores = [each["score"] for each in line["captions"]]
    assert len(scores) == 2 and max(scores) < 0
    assert run(SAMPLES / "owl.png", "--top-p", "0.5") == 1
    assert "top_p has no effect without a temperature" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "complaint"),
    [
        ("--top-p", "7", "'top_p' should be less than or equal to 1"),
        ("--num-beams", "3.5", "'num_beams' should be a valid integer"),
        ("--early-stopping", "maybe", "should be a valid boolean, or should be 'never'"),
    ],
)
def test_a_wrong_sampling_parameter_is_told_before_anything_is_opened(
    capfd, flag, value, complaint
):
    with pytest.raises(SystemExit) as ended:
        run("nowhere", flag, value)
    assert ended.value.code == 2
    assert complaint in capfd.readouterr().err


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
    assert run(photos, "--output", output) == 1
    assert "0 captioned, 5 before, 2 failed, 2 of them before" in capfd.readouterr().err
    shutil.copy(SAMPLES / "cats.png", photos)
    assert run(photos, "--output", output, "--retry-failed") == 1
    assert "1 captioned, 3 before, 1 failed; try" in capfd.readouterr().err
    (photos / "link.jpg").unlink()
    shutil.copy(SAMPLES / "owl.png", photos / "link.jpg")
    assert run(photos, "--output", output, "--retry-failed") == 0
    assert run(photos, "--output", output) == 0
    assert "0 captioned, 5 before, 0 failed" in capfd.readouterr().err


def test_the_same_command_goes_on_after_a_kill(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    cats = photos / "cats.png"
    state = cats.stat()
    lines = (
        {"id": str(cats), "caption": "kept as it is", "size": state.st_size,
         "modified": state.st_mtime_ns},
        {"id": "elsewhere.png", "error": "not of this run"},
        {"id": str(photos / "donuts.png"), "error": "left as it is"},
        {"id": str(photos / "umbrella.png"), "caption": "cut off"},
    )  # fmt: skip
    output.write_text("\n".join(json.dumps(line | MADE_BY) for line in lines)[:-4])
    link = tmp_path / "link.jsonl"
    link.symlink_to(output)
    assert run(photos, "--output", link) == 1
    found = entries(output)
    assert found.pop("elsewhere.png")["error"] == "not of this run"
    assert found.pop("donuts.png")["error"] == "left as it is"
    captions = {name: line["caption"] for name, line in found.items()}
    assert captions == {n: SAID[n] for n in PHOTOS - {"donuts.png"}} | {"cats.png": "kept as it is"}
    assert "2 captioned, 2 before, 2 failed, 2 of them before" in capfd.readouterr().err
    assert run(photos, "--output", link, "--retry-failed") == 1
    assert entries(output)["donuts.png"]["caption"] == SAID["donuts.png"]
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.jsonl", "link.jsonl", "photos"]
    assert "1 captioned, 3 before, 1 failed, 1 of them before" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("file,caption\na.png,an owl\n", "line 1, is no row of ours"),
        ("a note without an end", "line 1, is no row of ours"),
        ('{"id": "a.png", "model": "git-base", "caption": "a cat"}\n', "another model"),
        *(
            (json.dumps({"id": "a", "caption": "b"} | MADE_BY | other) + "\n", f"another {what}")
            for what, other in (
                ("prompt", {"prompt": "how many"}),
                ("max_new_tokens", {"settings": MADE_BY["settings"] | {"max_new_tokens": 3}}),
                ("engine", {"settings": MADE_BY["settings"] | {"engine": "x"}}),
                ("precision", {"settings": MADE_BY["settings"] | {"precision": "int8/int8/int8"}}),
            )
        ),
    ],
)
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
        (["{empty}/*.tar"], "nothing is called like"),
        (["{empty}"], "holds no images"),
        (["{empty}/files/photos.zip"], "photos.zip is not read: unpack it"),
        (["{empty}/files/nothing.csv"], "nothing.csv is empty"),
        (["{empty}/files/nothing.txt"], "no list or archive names or holds any"),
        ([str(SAMPLES), "--max-new-tokens", "1000"], "max_new_tokens is 1000"),
        ([str(SAMPLES), "--output", "{empty}/no/such/captions.jsonl"], "No such file or directory"),
        ([str(SAMPLES), "--output", "{empty}/captions.xlsx"], "name an output that ends in .jsonl"),
    ],
)
def test_what_can_not_be_done_is_said(arguments, complaint, tmp_path, capfd):
    files = tmp_path / "files"
    files.mkdir()
    for name in ("photos.zip", "nothing.csv", "nothing.txt"):
        (files / name).touch()
    assert run(*(a.replace("{empty}", str(tmp_path)) for a in arguments)) == 1
    said = capfd.readouterr()
    assert complaint in said.err
    assert not said.out


def test_two_runs_do_not_write_to_one_file(photos, tmp_path, capfd):
    output = tmp_path / "captions.jsonl"
    first = Lines(output)
    assert run(photos, "--output", output) == 1
    assert "another run writes" in capfd.readouterr().err
    first.close()
    assert run(photos, "--output", output) == 0


def test_what_was_cut_off_and_what_was_skipped_is_told(photos, capfd):
    (photos / "phone.HEIC").touch()
    assert run(photos, "--max-new-tokens", "2") == 0
    said = capfd.readouterr()
    assert {json.loads(line)["finish_reason"] for line in said.out.splitlines()} == {"length"}
    assert "4 captioned, 4 of them cut off (see --max-new-tokens), 0 failed" in said.err
    assert "skipped what is not named like an image: 1 .txt, 1 .heic" in said.err


FOUR_SLOTS = partial(fake_engine, EngineConfig(slots=4))


def local(open_engine, folder: Path) -> LocalCaptioner:
    setup = EngineSetup(fake_folder(folder / "engine"), main=partial(fake_worker, open_engine))
    return LocalCaptioner(setup, None, {}, MAX_PIXELS)


def captioned(open_engine, given: list[Path], folder: Path, **options) -> dict[str, object]:
    """An engine's caption of each file, or what was wrong with it."""
    with closing(local(open_engine, folder)) as captioner:
        captioning = Captioning(captioner, CaptioningOptions(10**8, **options), Kept())
        outcomes = captioning.run(items(parts(map(str, given), Columns(), 10**8)))
        return {each.item.id: each.error or each.captions[0].caption for each in outcomes}


@pytest.mark.parametrize("crashes", [False, True])
def test_an_image_that_an_engine_can_not_bear_fails_alone(crashes, tmp_path):
    files = small_images(tmp_path, 20)
    outcomes = captioned(partial(allergic_engine, crashes), files, tmp_path)
    assert outcomes.pop(str(files[7])) == "the engine failed on it twice, the second time alone"
    expected = fake_engine().generate([file.read_bytes() for file in files])
    said = {str(f): c.text for f, c in zip(files, expected, strict=True)}
    assert outcomes == {name: text for name, text in said.items() if name != str(files[7])}


class Counting:
    """Counts its calls."""

    at_once, asked = 4, 0

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        self.asked += 1
        return (ScoredCaption(f"{len(image)} {prompt}", "stop"),)

    def stop(self) -> None:
        pass


def test_equal_images_are_captioned_once(tmp_path):
    files = small_images(tmp_path, 4)
    for copy in range(10):
        files.append(tmp_path / f"copy{copy}.png")
        shutil.copy(files[copy % 4], files[-1])
    captioner = Counting()
    captioning = Captioning(captioner, CaptioningOptions(10**8, once=True), Kept())
    found = items(parts(map(str, files), Columns(), 10**8), prompt="x")
    outcomes = list(captioning.run(found))
    assert (len(outcomes), captioner.asked) == (14, 4)
    for outcome in outcomes:
        assert outcome.captions[0].caption == f"{Path(outcome.item.id).stat().st_size} x"


def test_rows_can_come_in_the_order_of_the_input(tmp_path):
    files = small_images(tmp_path, 60)
    files.insert(3, tmp_path / "none.png")
    files[3].write_bytes(b"GIF")
    outcomes = captioned(FOUR_SLOTS, files, tmp_path, ordered=True)
    assert list(outcomes) == [str(file) for file in files]
    assert "not an image" in outcomes[str(files[3])]


def test_an_image_that_is_too_large_fails_alone(tmp_path, capfd):
    [small] = small_images(tmp_path, 1)
    large = tmp_path / "large.png"
    Image.effect_noise((600, 600), 100).save(large)
    many = tmp_path / "many.png"
    Image.new("L", (4000, 4000)).save(many)
    flags = ("--max-image-mb", "0.1", "--max-pixels", "1000000")
    assert run(tmp_path, *flags) == 1
    said = {
        Path(line["id"]).name: line for line in map(json.loads, capfd.readouterr().out.splitlines())
    }
    assert "more than 0.1 MB" in said["large.png"]["error"]
    assert "too many pixels" in said["many.png"]["error"]
    assert said[small.name]["caption"]


def test_names_need_not_be_utf_8(tmp_path):
    name = os.fsdecode(b"\xe9t\xe9.png")
    shutil.copy(SAMPLES / "owl.png", tmp_path / name)
    output = tmp_path / "captions.jsonl"
    for _ in range(2):  # the second run finds it done
        assert run(tmp_path / name, "--output", output) == 0
        [line] = output.read_text("utf-8").splitlines()
        written = json.loads(line)["id"]
        assert restored(written) == str(tmp_path / name)
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


def test_hidden_folders_are_left_out(photos, tmp_path):
    hidden = photos / ".thumbnails"
    hidden.mkdir()
    shutil.copy(photos / "cats.png", hidden / "small.png")
    shutil.copy(photos / "cats.png", photos / "._cats.png")
    output = tmp_path / "captions.jsonl"
    assert run(photos, "--output", output) == 0
    assert set(entries(output)) == PHOTOS


def test_only_as_many_are_held_as_keep_the_engine_busy(tmp_path):
    files, taken = small_images(tmp_path, 300), []
    captioner = local(FOUR_SLOTS, tmp_path)
    found = items(parts(map(str, files), Columns(), 10**8))
    outcomes = Captioning(captioner, CaptioningOptions(10**8), Kept()).run(
        taken.append(item) or item for item in found
    )
    for ended, _ in enumerate(outcomes, 1):
        assert len(taken) - ended <= 2 * (8 + 64)  # captioning, on the way, or told
    assert len(taken) == 300
    captioner.close()


def test_a_caller_that_has_enough_is_let_go(tmp_path):
    captioner, taken = Counting(), []
    found = items(parts(map(str, small_images(tmp_path, 300)), Columns(), 10**8))
    outcomes = Captioning(captioner, CaptioningOptions(10**8), Kept()).run(
        taken.append(item) or item for item in found
    )
    next(outcomes)
    outcomes.close()
    assert len(taken) < 300


def test_large_files_are_not_read_many_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(captioning, "_HELD", 10**6)
    held, most = set(), []

    class Holding(Counting):
        def caption(self, image, prompt):
            held.add(image[-3:])
            most.append(len(held))
            time.sleep(0.05)
            held.discard(image[-3:])
            return super().caption(image, prompt)

    files = small_images(tmp_path, 12)
    for number, file in enumerate(files):
        file.write_bytes(file.read_bytes() + bytes(400_000) + b"%03d" % number)
    found = items(parts(map(str, files), Columns(), 10**8))
    outcomes = Captioning(Holding(), CaptioningOptions(10**8), Kept()).run(found)
    assert len(list(outcomes)) == 12
    assert max(most) <= 3, "of 400 KB, for a megabyte"
