"""The demo model: its grammar, its training's losses, and what the committed engine says."""

import json
import random

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from demo import grammar, model
from demo.nouns import NOUNS
from runtime.engine import Engine
from runtime.errors import InvalidRequest
from runtime.planning.config import EngineConfig
from tests.support.paths import DEMO, ROOT, SAMPLES
from tests.support.varied import agreement

SAID = json.loads((SAMPLES / "captions.json").read_text())


def images() -> list[bytes]:
    return [(SAMPLES / name).read_bytes() for name in SAID]


def test_the_grammar_says_what_the_readme_promises():
    noun = {n.singular: n for n in NOUNS}
    above, left = grammar.Relation.ABOVE, grammar.Relation.LEFT_OF
    scenes = [
        grammar.Scene(noun["cat"], "green", count=2),
        grammar.Scene(noun["eagle"], "blue", relation=above, other=noun["shark"]),
        grammar.Scene(noun["tractor"], "black", relation=left, other=noun["balloon"]),
        grammar.Scene(noun["unicorn"], "white"),
    ]
    assert [s.caption for s in scenes] == [
        "two cats on a green background",
        "an eagle above a shark on a blue background",
        "a tractor to the left of a balloon on a black background",
        "a unicorn on a white background",
    ]
    assert dict(scenes[1].questions) == {
        "what colour is the background": "blue",
        "what is above the shark": "eagle",
        "what is below the eagle": "shark",
        "what is above": "eagle",
        "what is below": "shark",
        "the eagle is": "above",
        "the shark is": "below",
    }
    assert len(NOUNS) >= 100
    assert len({n.emoji for n in NOUNS}) == len({n.singular for n in NOUNS}) == len(NOUNS)


def test_training_never_sees_a_held_out_caption():
    rng = random.Random(0)
    train = {grammar.sample(rng, held_out=False).caption for _ in range(3000)}
    held = {grammar.sample(rng, held_out=True).caption for _ in range(1000)}
    assert not train & held
    assert len(held) > 500


def test_the_vocabulary_covers_all_that_is_said():
    words, rng = set(grammar.vocabulary()), random.Random(1)
    for held_out in (True, False):
        for _ in range(500):
            scene = grammar.sample(rng, held_out=held_out)
            said = [scene.caption, *(text for pair in scene.questions for text in pair)]
            assert {w for text in said for w in text.split()} <= words


def test_packed_training_is_the_model_itself():
    """Texts side by side behind one image give the logits that each gives alone."""
    from demo.train import _SEGMENTS, PackedGit

    torch.manual_seed(0)
    size = len(model.build_processor().tokenizer)
    packed = PackedGit(model.build_model(size)).eval()
    pixels = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    tokens = torch.randint(4, size, (2, sum(_SEGMENTS)))
    labels = torch.randint(4, size, tokens.shape)
    values = (pixels.float() - packed.image_mean) / packed.image_std
    with torch.inference_mode():
        loss, *_ = packed(pixels, tokens, labels, torch.zeros(2, 64, dtype=torch.long))
        logits = [
            packed.git(input_ids=part, pixel_values=values, use_cache=False).logits[:, 65:]
            for part in tokens.split(_SEGMENTS, dim=1)
        ]
    alone = torch.nn.functional.cross_entropy(torch.cat(logits, 1).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(alone.item(), abs=1e-4)


def test_every_sample_is_captioned_word_for_word(demo):
    captions = demo.generate(images())
    assert [c.text for c in captions] == [said["caption"] for said in SAID.values()]


def test_every_question_about_the_samples_is_answered(demo):
    asked = [
        (image, question, answer)
        for image, said in zip(images(), SAID.values(), strict=True)
        for question, answer in said["questions"].items()
    ]
    answers = demo.generate([a[0] for a in asked], [a[1] for a in asked])
    right = sum(a.text == answer for a, (_, _, answer) in zip(answers, asked, strict=True))
    assert right >= len(asked) - 1


@pytest.mark.parametrize("config", [
    EngineConfig(slots=1, provider="cpu"),
    EngineConfig(slots=5, encode_batch=2, provider="cpu"),
    EngineConfig(slots=4, refill=False, provider="cpu"),
], ids=["single", "refill", "static"])  # fmt: skip
def test_batching_changes_no_caption(demo, config):
    engine = Engine.open(DEMO, config)
    said = [c.token_ids for c in engine.generate(images() * 2)]
    assert said == [c.token_ids for c in demo.generate(images() * 2)]


def test_the_engine_was_made_from_the_committed_weights():
    committed = load_file(ROOT / "demo/model/model.safetensors")
    exported = {
        tensor.name: numpy_helper.to_array(tensor)
        for graph in ("encoder.onnx", "decoder.onnx")
        for tensor in onnx.load(DEMO / graph).graph.initializer
    }
    shared = committed.keys() & exported.keys()
    assert len(shared) > 50
    for name in shared:
        assert np.array_equal(exported[name], committed[name].astype(np.float32)), name
    ours, theirs = (
        Tokenizer.from_file(str(f / "tokenizer.json")) for f in (DEMO, ROOT / "demo/model")
    )
    assert ours.to_str() == theirs.to_str()


def test_a_question_may_end_with_its_mark(demo):
    cats = (SAMPLES / "cats.png").read_bytes()
    said = demo.generate([cats] * 2, ["how many cats are there", "How many cats are there?"])
    assert [caption.text for caption in said] == ["two", "two"]


@pytest.mark.parametrize("prompt", ["\ud800", "x" * 5000, "那里有几只猫", "\U0001f600"])
def test_prompts_that_nobody_could_answer_are_refused(demo, prompt):
    with pytest.raises(InvalidRequest, match="the prompt"):
        demo.limits.check(prompt, {})


def test_training_resumes_its_own_work_only(tmp_path, monkeypatch):
    from demo import train

    monkeypatch.setattr(train, "CHECKPOINT", tmp_path / "checkpoint.pt")
    part, settings = torch.nn.Linear(2, 2), train.Settings()
    assert train._resume(settings, part) == 0
    train._save(7, settings, part)
    assert train._resume(settings, torch.nn.Linear(2, 2)) == 7
    with pytest.raises(InvalidRequest, match=r"other settings.*delete it"):
        train._resume(train.Settings(scenes=settings.scenes + 1), part)


def test_fp16_says_what_pytorch_says_of_more_than_the_samples():
    """What `make gpu-check` asks of a GPU, asked of a processor."""
    assert agreement(Engine.open(DEMO, EngineConfig(precision="fp16-fused/fp16/float16")), 48) == 1
