"""What settings do to captions: measured as COCO's evaluation does."""

import csv
import json
import shutil

import numpy as np
import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from bench.quality import command, data
from bench.quality.command import main
from bench.quality.data import NoData
from bench.quality.metrics import difference, score, tokens
from runtime.model.manifest import EXACT
from tests.support.paths import DEMO, ROOT, SAMPLES

SAID = {n: s["caption"] for n, s in json.loads((SAMPLES / "captions.json").read_text()).items()}
TEXTS = (
    "A man riding a wave on top of a surfboard.",
    "Two dogs, one brown and one white, don't look at the camera",
    'a sign that says "stop" - it\'s 5:30 p.m.',
    "The U.S. flag (old) flies over john's well-known house...",
    "rock 'n' roll at 20% off: $5.00 & up!",
    "a woman\u2019s red, white and blue umbrella; half-open",
    "cannot tell whether it's 10,000 or 10/12 people\nin the picture",
)


def test_words_are_split_as_the_java_tokeniser_splits_them():
    if shutil.which("java") is None:
        pytest.skip("needs Java, to compare with")
    theirs = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(TEXTS)})
    ours = {n: [tokens(text)] for n, text in enumerate(TEXTS)}
    other = {ours[n][0]: theirs[n][0] for n in ours if ours[n] != theirs[n]}
    assert other == {
        "a sign that says stop it 's 5:30 p.m": "a sign that says stop it 's 5:30 p.m.",
        "rock 'n roll at 20 % off $ 5.00 & up": "rock 'n' roll at 20 % off $ 5.00 & up",
    }


def test_what_people_said_word_for_word_scores_highest():
    captions = list(SAID.values())
    references = [[caption, f"well, {caption}."] for caption in captions]
    best = score(captions, references)
    assert best.whole["BLEU-4"] == pytest.approx(1, abs=1e-6)
    assert best.whole["ROUGE-L"] == 1
    worse = score([*captions[1:], captions[0]], references)
    assert all(worse.whole[metric] < best.whole[metric] for metric in best.whole)


def test_a_difference_comes_with_what_chance_does_to_it():
    chance = np.random.default_rng(0)
    first = chance.normal(0.5, 0.1, 400)
    mean, low, high = difference(first, first + 0.05 + chance.normal(0, 0.02, 400))
    assert low < mean < high
    assert 0.045 < low < high < 0.055
    mean, low, high = difference(first, chance.permutation(first))
    assert low < 0 < high


def test_references_are_read_in_the_forms_that_there_are(tmp_path):
    names = list(SAID)[:2]
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [
            {"image_id": n % 2, "caption": f"{names[n % 2]} {n}"} for n in range(4)
        ],
    }  # fmt: skip
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    rows = [{"file_name": names[n % 2], "caption": f"{names[n % 2]} {n}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lists = [
        {"image": name, "captions": [f"{name} {n}", f"{name} {n + 2}"]}
        for n, name in enumerate(names)
    ]
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    expected = [
        (SAMPLES / name, (f"{name} {n}", f"{name} {n + 2}")) for n, name in enumerate(names)
    ]
    for file in ("coco.json", "rows.jsonl", "rows.csv", "lists.json"):
        found = data.read(tmp_path / file, SAMPLES)
        assert [(each.file, each.references) for each in found] == expected
    with pytest.raises(NoData, match="which is not in"):
        data.read(tmp_path / "coco.json", ROOT)
    (tmp_path / "other.json").write_text('[{"picture": "a"}]')
    with pytest.raises(NoData, match="can't be read as references"):
        data.read(tmp_path / "other.json", SAMPLES)


def _written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


COCO = {"images": [{"id": 1, "file_name": "cats.png"}],
        "annotations": [{"image_id": 1, "caption": "cats"}]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("a.json", COCO | {"images": [{"id": 1, "file_name": 7}]}, "at `$.images[0].file_name`"),
        ("a.json", COCO | {"annotations": [{"image_id": 1, "caption": 7}]}, "got `int` - at"),
        ("a.json", COCO | {"annotations": [{"image_id": 1, "caption": None}]}, "got `null` - at"),
        ("a.json", COCO | {"images": []}, "no image has its image_id - at `$.annotations[0]`"),
        ("a.json", [1, 2], "got `int` - at `$[0]`"),
        ("a.json", [{"image": "cats.png", "caption": "cats", "prompt": 7}], "at `$[0].prompt`"),
        ("a.json", [{"image": "cats.png", "captions": {"x": 1}}], "at `$[0].captions`"),
        ("a.json", {"captions": {"x": 1}}, "missing required field `images`"),
        ("a.json", '[{"image": ' + "[" * 100_000, "at `$[0].image`"),
        ("a.json", '[{"else": ' + "[" * 100_000, "recursion"),
        ("a.jsonl", '{"image": "cats.png", "text": "cats"}\n\n{"image": 7}', "at `$[1].image`"),
        ("a.csv", "image,caption\ncats.png,cats, two\n", "more cells than columns"),
        ("a.csv", "image,caption\ncats.png\n", "none of caption, reference"),
    ],
)  # fmt: skip
def test_references_of_a_wrong_type_are_an_error_that_says_where(tmp_path, name, content, wrong):
    path = _written(tmp_path / name, content)
    with pytest.raises(NoData) as error:
        data.read(path, SAMPLES)
    assert str(path) in str(error.value)
    assert wrong in str(error.value)


def test_references_without_words_and_two_images_of_one_id_are_refused(tmp_path):
    (tmp_path / "cats.png").touch()
    path = _written(tmp_path / "a.json", [{"image": "cats.png", "captions": ["cats", " . "]}])
    with pytest.raises(NoData, match=r"a reference of cats.png has no words"):
        data.read(path, tmp_path)
    images = [{"id": 1, "file_name": name} for name in ("cats.png", "dogs.png")]
    coco = {"images": images, "annotations": [{"image_id": 1, "caption": "cats"}]}
    with pytest.raises(NoData, match="two images have one id"):
        data.read(_written(tmp_path / "b.json", coco), tmp_path)


def test_pictures_outside_of_their_folder_are_refused(tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    for folder in (tmp_path, photos):
        shutil.copy(SAMPLES / "cats.png", folder)
    for name in (str(tmp_path / "cats.png"), "../cats.png", "below/../../cats.png"):
        path = _written(tmp_path / "a.json", [{"image": name, "caption": "cats"}])
        with pytest.raises(NoData, match="which is not in"):
            data.read(path, photos)
    for name in (str(photos / "cats.png"), "./cats.png"):
        path = _written(tmp_path / "a.json", [{"image": name, "caption": "cats"}])
        assert data.read(path, photos)[0].file == photos / "cats.png"


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (["--limit", "0"], "--limit is 0: give 1 or more"),
        (["--limit", "-1"], "--limit is -1: give 1 or more"),
        (["--beams", "1", "0"], "--beams has 0: give 1 to 8"),
        (["--beams", "9"], "--beams has 9: give 1 to 8"),
        (["--output", "{}"], "Is a directory: '{}'"),
        (["--output", "{}/a.json/page.html"], "'{}/a.json'"),
        (["--json", "{}"], "Is a directory: '{}'"),
        (["--json", "{}/none/x.json"], "No such file or directory: '{}/none/x.json'"),
        (["--json", "{}/a.json"], "{}/a.json is read, and would be overwritten"),
        (["--json", "{}/linked.json"], "{}/linked.json is read, and would be overwritten"),
        (["--output", "{}/linked.png"], "{}/linked.png is read, and would be overwritten"),
        (["--output", "{}/x.html", "--json", "{}/x.html"], "are both {}/x.html: give two files"),
    ],
)
def test_flags_that_cannot_be_followed_end_it_before_a_picture_is_captioned(
    tmp_path, capsys, monkeypatch, flags, wrong
):
    monkeypatch.setattr(command, "_contestants", lambda _: pytest.fail("it goes on to caption"))
    monkeypatch.chdir(tmp_path)  # where --output is by default
    path = _written(tmp_path / "a.json", COCO)
    (tmp_path / "linked.json").hardlink_to(path)
    photos = tmp_path / "photos"
    shutil.copytree(SAMPLES, photos)
    (tmp_path / "linked.png").hardlink_to(photos / "cats.png")
    arguments = ["--engine", str(DEMO), "--data", str(path), "--images", str(photos)]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, *(flag.format(tmp_path) for flag in flags)])
    assert exit_.value.code == 2
    assert wrong.format(tmp_path) in capsys.readouterr().err


def test_a_page_stays_as_it_was_if_captioning_fails(tmp_path, capsys):
    path, before = _written(tmp_path / "a.json", COCO), _written(tmp_path / "page.html", "before")
    arguments = ["--engine", str(DEMO), "--data", str(path), "--images", str(SAMPLES)]
    assert main([*arguments, "--precisions", "none", "--output", str(before)]) == 1
    assert "has no combination none" in capsys.readouterr().err
    assert before.read_text() == "before"


def test_settings_are_compared_on_the_same_pictures(tmp_path, capsys):
    named = list(SAID.items())[:1]  # PyTorch is slow
    rows = [{"image": name, "references": [said, f"there {said}"]} for name, said in named]
    rows.append({"image": "cats.png", "prompt": "how many cats are there", "references": ["two"]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    page, answers = tmp_path / "page.html", tmp_path / "captions.json"
    arguments = [
        "--engine", str(DEMO), "--data", str(tmp_path / "data.json"), "--images", str(SAMPLES),
        "--precisions", EXACT, "int8/int8/int8", "--beams", "1", "2", "--provider", "cpu",
        "--reference", str(ROOT / "demo" / "model"), "--output", str(page), "--json", str(answers),
    ]  # fmt: skip
    assert main(arguments) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[1:7]] == [
        "PyTorch", "PyTorch, 2 beams", EXACT, f"{EXACT}, 2 beams",
        "int8/int8/int8", "int8/int8/int8, 2 beams",
    ]  # fmt: skip
    assert lines[1][2] == "100.0"
    assert all(line[7] == "100.0% the same" for line in lines[2:7])
    found = json.loads(answers.read_text())
    assert found[-1]["captions"][EXACT] == found[-1]["captions"]["PyTorch"] == "two"
    assert "No picture is described worse" in page.read_text()


def test_the_pictures_that_lost_most_are_shown(tmp_path):
    from bench.quality import page

    pictures = [data.Picture(SAMPLES / name, (said,)) for name, said in SAID.items()]
    captions = list(SAID.values())
    references = [picture.references for picture in pictures]
    wrong = ["a <b>dog</b>", *captions[1:]]
    results = [
        page.Result(name, said, score(said, references))
        for name, said in (("first", captions), ("second", wrong))
    ]
    page.write(tmp_path / "page.html", "demo", pictures, results)
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure>") == 1
    assert "a &lt;b&gt;dog&lt;/b&gt;" in text
    assert pictures[0].file.name in text
