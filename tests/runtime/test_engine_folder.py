"""Engine folders that are missing, damaged or foreign, and providers that can't be had."""

import json
import shutil

import numpy as np
import onnxruntime as ort
import pytest

from runtime.engine import Engine
from runtime.errors import EngineFolderError, InvalidRequest, ProviderError
from runtime.execution import loader
from runtime.model import manifest as manifests
from runtime.model.manifest import EXACT
from runtime.planning.config import EngineConfig
from runtime.planning.plan import Plan
from runtime.providers import openvino, registry, session
from runtime.providers.session import Placement
from tests.support.paths import DEMO


@pytest.fixture
def folder(small, tmp_path):
    return shutil.copytree(small[1], tmp_path / "engine")


def test_a_manifest_survives_the_way_to_disk_and_back(folder):
    manifest = manifests.load(folder)
    manifest.save(folder)
    assert manifests.load(folder) == manifest


def test_what_is_wrong_with_a_folder_is_named(folder, tmp_path):
    def broken(message, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(EngineFolderError, match=message):
            Engine.open(copy, EngineConfig(provider="cpu"))

    def edit(**changes):
        def change(copy):
            content = json.loads((copy / "manifest.json").read_text()) | changes
            (copy / "manifest.json").write_text(json.dumps(content))

        return change

    def truncate(name):
        return lambda copy: (copy / name).write_bytes((copy / name).read_bytes()[:-100])

    broken(r"no manifest\.json.*make export", lambda copy: (copy / "manifest.json").unlink())
    broken("can't be read", lambda copy: (copy / "manifest.json").write_text("{"))
    broken("can't be read", edit(sizes={}))
    broken(r"can't be read.*Expected `int`.*tokens\.bos", edit(tokens={"bos": "x"}))
    broken(r"can't be read.*Expected `array`.*variants", edit(variants=7))
    broken(r"can't be read.*no graph .decoder. of fp32/fp32/float32", edit(variants=[]))
    broken("has no combination fp32/fp32/float32", edit(combinations=[]))
    manifest = json.loads((folder / "manifest.json").read_text())
    for part, changed in (
        ("tokens", {"bos": -1}),
        ("tokens", {"eos": 2**70}),
        ("sizes", {"vocabulary": 2}),
        ("sizes", {"image": 10**9}),
        ("sizes", {"prefix": 2**40}),
        ("sizes", {"frames": 10**9}),
        ("preprocessing", {"crop": 7}),
    ):
        broken("can't be read", edit(**{part: manifest[part] | changed}))
    deep = "[" * 10**6
    broken("can't be read", lambda copy: (copy / "manifest.json").write_text(deep))
    test = {"seeds": [1], "tokens": [[5, 6], [7]]}
    broken("can't be read.*not as many captions as pictures", edit(self_test=test))
    broken("can't be read", lambda copy: (copy / "manifest.json").write_text("[]"))
    broken("can't be read", lambda copy: (copy / "manifest.json").write_bytes(b"\xff"))
    broken("another version", edit(format=99))
    broken("encoder.onnx is missing", lambda copy: (copy / "encoder.onnx").unlink())
    broken("decoder.onnx is damaged", truncate("decoder.onnx"))
    broken("tokenizer.json is damaged", lambda copy: (copy / "tokenizer.json").write_text("{}"))
    broken("weights.data is damaged", truncate("weights.data"))
    with pytest.raises(EngineFolderError, match=r"no combination int4/fp32/int8: use one of fp32/"):
        Engine.open(folder, EngineConfig(precision="int4/fp32/int8"))


def test_a_provider_that_is_missing_is_an_error_with_a_remedy(folder):
    for name in ("cuda", "tensorrt"):
        if registry._PROVIDERS[name].ep in ort.get_available_providers():
            pytest.skip(f"{name} is here")
        with pytest.raises(ProviderError, match=f"{name} is not available here: install"):
            Engine.open(folder, EngineConfig(provider=name))
    with pytest.raises(ProviderError, match="unknown provider 'gpu': use one of auto, tensorrt"):
        Engine.open(folder, EngineConfig(provider="gpu"))


def test_a_session_that_fell_back_is_an_error(folder, monkeypatch):
    """As onnxruntime-gpu does without a driver: the provider is listed, the session lacks it."""
    monkeypatch.setattr(session, "require", lambda name: None)
    cpu_session = ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])
    monkeypatch.setattr(session.ort, "InferenceSession", lambda *_, **__: cpu_session)
    with pytest.raises(ProviderError, match="cuda was asked for, but the session fell back to CPU"):
        session.open_session(folder / "decoder.onnx", Placement("cuda"))


def test_auto_steps_down_and_says_so(folder, monkeypatch, caplog):
    monkeypatch.setattr(registry, "available", lambda: ("openvino", "cpu"))
    monkeypatch.setattr(registry, "require", lambda name: None)
    monkeypatch.setattr(session, "require", lambda name: None)

    def fails(*_):
        raise RuntimeError("a reason")

    monkeypatch.setattr(openvino, "add_to", fails)
    engine = Engine.open(folder)
    assert "on cpu" in engine.runs_on
    assert "openvino was tried and left out" in caplog.text
    assert "a reason" in caplog.text
    with pytest.raises(ProviderError, match="a reason"):
        Engine.open(folder, EngineConfig(provider="openvino"))


def test_a_broken_installation_is_left_out_with_a_word(monkeypatch, caplog):
    def broken():
        raise ProviderError("openvino can't be loaded: no library")

    monkeypatch.setattr(openvino, "devices", broken)
    assert "openvino" not in registry.available()
    assert "no library" in caplog.text


def test_the_fastest_provider_comes_first(monkeypatch):
    monkeypatch.setattr(registry, "_is_installed", lambda provider: True)
    monkeypatch.setattr(registry, "require", lambda name: None)
    assert registry.available() == ("tensorrt", "cuda", "openvino", "cpu")


def test_a_provider_that_opens_a_graph_but_cannot_run_it_is_found_at_the_start(folder):
    wrong = {"pixels": np.zeros((1, 3, 7, 7), np.uint8)}
    with pytest.raises(ProviderError, match=r"cpu can't run encoder\.onnx"):
        session.open_session(folder / "encoder.onnx", Placement("cpu"), wrong)


def test_openvino_agrees_with_the_cpu(demo):
    if not openvino.devices():
        pytest.skip("the OpenVINO plugin offers no device here: it needs an Intel processor")
    from tests.support.paths import DEMO, SAMPLES

    images = [path.read_bytes() for path in sorted(SAMPLES.glob("*.png"))]
    fast = Engine.open(DEMO, EngineConfig(provider="openvino"))
    assert [c.text for c in fast.generate(images)] == [c.text for c in demo.generate(images)]


def test_slots_that_fit_no_provider_are_refused(monkeypatch):
    plans = Plan(EXACT, "openvino"), Plan(EXACT, "cpu")
    monkeypatch.setattr(loader, "resolve", lambda *_: plans)
    monkeypatch.setattr(loader, "memory", lambda: 2**20)
    with pytest.raises(ProviderError, match="16 slots do not fit"):
        loader.prepare(DEMO, EngineConfig())


def test_impossible_settings_are_refused():
    for wrong in ({"slots": 0}, {"slots": 10**20}, {"encode_batch": 0}, {"threads": -1},
                  {"text_tokens": 1}, {"patience": -1}):  # fmt: skip
        with pytest.raises(InvalidRequest):
            EngineConfig(**wrong)
