"""What every start has to say: who computes something else is found before it serves."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import ProviderError
from runtime.execution import loader, self_test
from runtime.execution.host import HostRunner
from runtime.execution.loader import prepare
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig
from tests.support.paths import DEMO

CPU = EngineConfig(provider="cpu", precision="fp32/fp32/float32", slots=2)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DEMO, tmp_path / "engine")
    return tmp_path / "engine"


def test_the_stored_captions_differ_from_one_another():
    test = manifests.load(DEMO).self_test
    assert len(test.seeds) == len(set(test.tokens)) == self_test.PICTURES
    assert all(len(tokens) > 2 for tokens in test.tokens)


def test_a_picture_depends_on_its_seed_alone():
    sizes = manifests.load(DEMO).sizes
    first = self_test.picture(3, sizes)
    assert first.dtype == np.uint8 and first.shape == sizes.pixels
    assert np.array_equal(first, self_test.picture(3, sizes))
    assert not np.array_equal(first, self_test.picture(4, sizes))
    clip = self_test.picture(3, replace(sizes, frames=2))
    assert clip.shape == (2, *sizes.pixels)
    assert int(first.astype(int).sum()) == 3687437


def test_a_provider_that_computes_something_else_is_refused_when_it_is_named(monkeypatch):
    real = HostRunner.decode

    def wrong(self, tokens, fed, forced=(), candidates=1, searches=()):
        found = real(self, tokens, fed, forced, candidates)
        return replace(found, ids=found.ids + (fed[0] == 2))

    monkeypatch.setattr(HostRunner, "decode", wrong)
    with pytest.raises(ProviderError, match=r"self-test failed: picture 1 of 2.* try another"):
        Engine.open(DEMO, CPU)


def test_a_slot_with_less_room_than_the_captions_is_tested_as_far_as_it_goes():
    assert Engine.open(DEMO, replace(CPU, text_tokens=4)).runner.text_tokens == 4


def test_a_provider_that_can_not_run_the_graphs_is_refused_when_it_is_named(monkeypatch):
    def full(self):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(HostRunner, "warm_up", full)
    with pytest.raises(ProviderError, match="cpu can't run this: out of memory"):
        Engine.open(DEMO, CPU)


def test_a_provider_that_is_named_is_the_only_one_that_is_tried(monkeypatch):
    monkeypatch.setattr(loader.registry, "available", lambda: pytest.fail("it tries others"))
    assert [plan.encoder_provider for plan in prepare(DEMO, CPU).plans] == ["cpu"]


def test_auto_leaves_out_a_provider_that_computes_something_else(monkeypatch, caplog):
    real, tried = self_test.check, []

    def check(runner, *arguments):
        tried.append(runner)
        if len(tried) == 1:
            raise ProviderError("the self-test failed: nonsense")
        return real(runner, *arguments)

    monkeypatch.setattr(loader.self_test, "check", check)
    prepared = prepare(DEMO, CPU)
    [plan] = prepared.plans
    two = replace(prepared, plans=(plan, replace(plan, slots=3)))
    assert Engine.start(two).slots == 3
    assert "tried and left out: the self-test failed" in caplog.text


def test_weights_that_say_something_else_are_found(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["self_test"]["tokens"][1][0] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ProviderError, match="picture 2 of 2"):
        Engine.open(folder, CPU)


def test_random_weights_have_none_and_say_so(small):
    engine = Engine.open(small[1], EngineConfig(provider="cpu"))
    assert "self-test none" in engine.runs_on
