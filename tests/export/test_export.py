"""Exported graphs say what PyTorch says, for every checkpoint shape; failures leave nothing."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export import __main__ as command
from export import build as building
from export import output_folder
from export.build import Proof, build
from export.checkpoint import load
from export.errors import ExportError, Mismatch
from export.random_weights import from_config, random_weights
from export.verify import verify
from runtime.engine import Engine
from runtime.errors import ComputationFailed
from runtime.model import manifest as manifests
from runtime.model.manifest import read
from runtime.planning.config import EngineConfig
from runtime.request import FinishReason
from tests.support.checkpoints import PREFIXES, SHAPES
from tests.support.fakes import drained
from tests.support.paths import DEMO, ROOT


def test_every_shape_matches_generate_on_images_that_differ(exported):
    checkpoint, folder = exported
    manifest = manifests.load(folder)
    found = manifest.verification
    assert manifest.sizes.prefix == PREFIXES[checkpoint.name]
    assert (found["images"], found["new_tokens"]) in [(8, 20), (8, 8)]
    assert found["prompts"] == 2
    assert found["distinct_captions"] > 5, "images that all say the same prove nothing"
    assert 0 < found["max_logits_difference"] < 1e-3


def test_the_folder_holds_the_contract_and_nothing_else(exported):
    _, folder = exported
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "encoder.onnx",
        "decoder.onnx",
        "weights.data",
        "tokenizer.json",
        "manifest.json",
    }
    sizes = manifests.load(folder).sizes
    encoder, decoder = (onnx.load(folder / f"{graph}.onnx") for graph in ("encoder", "decoder"))
    [pixels] = encoder.graph.input
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [o.name for o in encoder.graph.output] == [
        f"image.{i}.{kind}" for i in range(sizes.layers) for kind in ("key", "value")
    ]
    assert [i.name for i in decoder.graph.input][:4] == [
        "token_ids", "lengths", "total_length", "candidates"
    ]  # fmt: skip
    assert [o.name for o in decoder.graph.output][:4] == [
        "candidate_ids", "candidate_logprobs", "best_logits", "logits"
    ]  # fmt: skip
    attention = [n for n in decoder.graph.node if n.op_type == "GroupQueryAttention"]
    assert len(attention) == sizes.layers
    assert all(n.domain == "com.microsoft" for n in attention)


def test_nothing_is_computed_behind_the_last_key_and_value(exported):
    """No query, feed-forward or logits for image tokens in the last decoder layer."""
    checkpoint, folder = exported
    names = {i.name for i in onnx.load(folder / "encoder.onnx").graph.initializer}
    last = checkpoint.sizes.layers - 1
    assert not [n for n in names if f"encoder.layer.{last}.intermediate" in n]
    assert not [n for n in names if n.startswith(("output.", "git.embeddings"))]


@torch.inference_mode()
def _torch_tokens(checkpoint, pixels, prompt, most):
    how = checkpoint.normalisation
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
    values = (torch.from_numpy(pixels)[None].float() * how.rescale - mean) / std
    ids = torch.tensor([prompt])
    out = checkpoint.model.generate(
        pixel_values=values, input_ids=ids, attention_mask=torch.ones_like(ids),
        max_new_tokens=most, do_sample=False, num_beams=1, pad_token_id=checkpoint.tokens.pad,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("refill", [True, False])
def test_the_engine_says_what_generate_says_in_mixed_batches(exported, refill):
    checkpoint, folder = exported
    engine = Engine.open(
        folder, EngineConfig(slots=3, encode_batch=2, refill=refill, provider="cpu")
    )
    rng = np.random.default_rng(1)
    expected = {}
    for index in range(8):
        pixels = rng.integers(0, 256, engine.manifest.sizes.pixels, np.uint8)
        words = [f"w{i}" for i in rng.integers(200, 290, index % 4)]
        most = 3 + index
        engine.submit(request := engine.request(pixels, " ".join(words), max_new_tokens=most))
        prompt = list(request.prompt_ids)
        assert len(prompt) == 1 + index % 4
        expected[request.id] = _torch_tokens(checkpoint, pixels, prompt, most)
    assert drained(engine) == expected


def test_numbers_that_break_down_end_their_own_request_and_no_other(exported, monkeypatch):
    _, folder = exported
    engine = Engine.open(folder, EngineConfig(slots=4, provider="cpu", encode_batch=4))
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, engine.manifest.sizes.pixels, np.uint8) for _ in range(4)]
    expected = [c.token_ids for c in engine.generate(images, max_new_tokens=6)]
    encode = engine.runner.encode

    def poisoned(pixels, slots):
        encode(pixels, slots)
        for image, [slot] in zip(pixels, slots, strict=True):
            if (image == images[1]).all():
                engine.runner._arena[-1][slot] = np.nan

    monkeypatch.setattr(engine.runner, "encode", poisoned)
    requests, outputs = [engine.request(image, max_new_tokens=6) for image in images], {}
    for request in requests:
        engine.submit(request)
    while not engine.idle:
        outputs |= {output.id: output for output in engine.step()}
    broken, *others = (outputs[requests[index].id] for index in (1, 0, 2, 3))
    assert broken.finish_reason is FinishReason.FAILED
    with pytest.raises(ComputationFailed, match="NaN"):
        engine.caption(requests[1], broken)
    assert [output.token_ids for output in others] == [expected[index] for index in (0, 2, 3)]
    monkeypatch.undo()
    assert engine.generate(images, max_new_tokens=6)[1].token_ids == expected[1]


def test_a_mismatch_fails_the_export_and_keeps_the_old_engine(tmp_path, monkeypatch):
    output = tmp_path / "engine"
    good = from_config("good", SHAPES["base"])
    build(good, output, Proof(1, 3, fast=False))
    before = (output / "manifest.json").read_bytes()
    write = building._write_graphs

    def other_weights(checkpoint, folder, fused):
        write(from_config("other", SHAPES["base"], seed=9), folder, fused)

    monkeypatch.setattr(building, "_write_graphs", other_weights)
    with pytest.raises(Mismatch, match=r"image 0 .* ONNX and PyTorch differ from token"):
        build(good, output, Proof(2, 8))
    assert (output / "manifest.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("output", ["", "photos", "photos/cat.jpg"])
def test_only_an_engine_is_ever_replaced(tmp_path, output):
    photo = tmp_path / "photos" / "cat.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    with pytest.raises(ExportError, match=r"choose another|folder of its own"):
        build(
            from_config("x", SHAPES["base"]), (tmp_path / output) if output else Path("engines/..")
        )
    assert photo.read_bytes() == b"precious"


def test_a_manifest_of_somebody_else_makes_no_engine(tmp_path):
    extension = tmp_path / "extension"
    extension.mkdir()
    (extension / "manifest.json").write_text('{"manifest_version": 3, "name": "mine"}')
    with pytest.raises(ExportError, match="exists and is no engine"):
        build(from_config("x", SHAPES["base"]), extension)
    assert (extension / "manifest.json").is_file()


def test_what_is_no_part_of_an_engine_is_not_replaced_with_it(tmp_path):
    engine = tmp_path / "engine"
    shutil.copytree(DEMO, engine)
    photo = engine / "photos" / "cat.jpg"
    photo.parent.mkdir()
    photo.write_bytes(b"precious")
    for cache in ("tensorrt", "compiled"):  # of providers
        (engine / cache).mkdir()
    with pytest.raises(ExportError, match=r"engine/photos is no part of the engine"):
        build(from_config("x", SHAPES["base"]), engine)
    assert photo.read_bytes() == b"precious"


def test_of_a_link_to_an_engine_what_it_leads_to_is_replaced(tmp_path):
    engine, link = tmp_path / "engine", tmp_path / "link"
    shutil.copytree(DEMO, engine)
    (engine / "plan.json").touch()
    link.symlink_to(engine)
    build(from_config("x", SHAPES["base"]), link, Proof(6, 5, fast=False))
    assert link.is_symlink() and read(engine).model == "x" and not (link / "plan.json").exists()


def test_random_weights_that_say_the_same_for_all_images_prove_nothing(tmp_path):
    checkpoint = from_config("x", SHAPES["base"])
    with torch.no_grad():
        checkpoint.model.git.visual_projection.visual_projection[1].weight.zero_()
    with pytest.raises(Mismatch, match="different captions"):
        build(checkpoint, tmp_path / "engine", Proof(6, 5))
    assert list(tmp_path.iterdir()) == []


def test_impossible_comparisons_are_refused(tmp_path):
    for images, tokens in ((0, 5), (2, 0), (2, 99)):
        with pytest.raises(ExportError, match="at least 1 image, and 1 to 35 tokens"):
            build(from_config("x", SHAPES["base"]), tmp_path / "engine", Proof(images, tokens))


def test_captions_may_be_compared_up_to_the_last_position(small):
    checkpoint, folder = small
    assert verify(checkpoint, folder, images=6, new_tokens=35).images == 6


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("write: No space left on device"),
    ],
    ids=["python", "c++"],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(building, "_write_graphs", full)
    with pytest.raises(ExportError, match="is full: free some space"):
        build(from_config("x", SHAPES["base"]), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_checkpoint_loads_and_exports(tmp_path, small):
    source = tmp_path / "checkpoint"
    shutil.copytree(ROOT / "demo" / "model", source)
    checkpoint = load(str(source))
    manifest = build(checkpoint, tmp_path / "engine", Proof(2, 4))
    assert manifest.model == "checkpoint"
    assert manifest.preprocessing.crop == manifest.sizes.image == 128


def test_random_weights_depend_on_the_seed_only():
    first, again, other = (
        from_config("x", SHAPES["base"], seed=s).model.state_dict() for s in (3, 3, 4)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_clear_errors(tmp_path, capsys, monkeypatch):
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text(json.dumps({"model_type": "bert"}))
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        (str(bert),): "is a bert model, not GIT",
        (str(empty),): "can't be loaded as a checkpoint",
        ("nobody/such-model",): "nobody/such-model",
        ("--random-weights", "git-huge"): "unknown shape 'git-huge': use one of git-base",
        (str(ROOT / "demo/model"), "--images", str(tmp_path / "none")): "not a folder of images",
    }
    for arguments, message in cases.items():
        assert command.main([*arguments, "--output", str(tmp_path / "out")]) == 1, arguments
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    def missing(_):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(command, "_export", missing)
    assert command.main(["x", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "needs torch" in error
    assert "export extra" in error


def test_known_shapes_are_those_of_the_published_checkpoints():
    import export.random_weights as module

    prefixes = {}
    for name, config in module.SHAPES.items():
        vision = config().vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        prefixes[name] = patches * (config().num_image_with_embedding or 1)
    assert prefixes == {
        "git-base": 197, "git-large": 257, "git-base-vqav2": 901, "git-large-vqav2": 901,
        "git-base-vatex": 1182, "git-large-vatex": 1542,
    }  # fmt: skip
    with pytest.raises(ExportError, match="unknown shape"):
        random_weights("git-tiny")


def test_images_of_the_users_own_are_compared_first(tmp_path, small, capsys):
    from PIL import Image

    from export.pictures import from_folder

    checkpoint, _ = small
    names = ["a.jpg", "b.png", *(f"c{index}.png" for index in range(14))]
    for index, name in enumerate(names):
        colour = (255 if index == 0 else 0, 0, 255 - index)
        Image.new("RGB", (50, 40), colour).save(tmp_path / name)
    Image.new("RGBA", (50, 40), (0, 0, 0, 0)).save(tmp_path / "c13.png")
    (tmp_path / "notes.png").write_text("no image")
    pixels = from_folder(tmp_path, checkpoint.preprocessing, checkpoint.sizes)
    assert [p.shape for p in pixels] == [(3, 32, 32)] * 16
    assert pixels[1][:, 0, 0].tolist() == [0, 0, 254]
    assert pixels[7].min() == 255, "transparency is white, as in the service"
    assert "notes.png" in capsys.readouterr().out
    (tmp_path / "b.png").unlink()
    with pytest.raises(ExportError, match=r"holds 15 images that can be read.* 16 or more"):
        from_folder(tmp_path, checkpoint.preprocessing, checkpoint.sizes)
    with pytest.raises(ExportError, match="not a folder"):
        from_folder(tmp_path / "none", checkpoint.preprocessing, checkpoint.sizes)
    with pytest.raises(ExportError, match="single-image"):
        from_folder(tmp_path, checkpoint.preprocessing, replace(checkpoint.sizes, frames=6))


def test_an_interrupt_as_the_engine_is_exchanged_leaves_the_old_one(tmp_path, monkeypatch):
    partial, output = tmp_path / ".engine-new", tmp_path / "engine"
    for folder in (partial, output):
        folder.mkdir()
    (output / "old").touch()
    rename = Path.rename

    def interrupted(self, target):
        if self == partial:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        output_folder._move_into_place(partial, output)
    assert (output / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"engine", ".engine-new"}


def test_a_folder_that_can_not_be_moved_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    partial, output = tmp_path / "partial", tmp_path / "engine"
    partial.mkdir()
    output.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == output)
    with pytest.raises(ExportError, match="is a mount"):
        output_folder._check_replaceable(output)

    def refused(path, target):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ExportError, match="can't be replaced: Operation not permitted"):
        output_folder._move_into_place(partial, output)
    assert sorted(tmp_path.iterdir()) == [output, partial]
