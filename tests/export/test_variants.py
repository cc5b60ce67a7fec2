"""The 8-bit variants: what they compute, and that none is kept without having been proven."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import gate
from export import variants as building
from export.build import Proof, build
from export.checkpoint import load
from export.errors import ExportError
from export.pictures import generated
from export.reference import Case, OnnxGraphs, caption
from export.weights import pool
from runtime.engine import Engine
from runtime.model import manifest as manifests
from runtime.model.manifest import EXACT
from runtime.planning.config import EngineConfig
from tests.support.paths import DEMO, ROOT, SAMPLES


@pytest.fixture(scope="module")
def demo_checkpoint():
    return load(str(ROOT / "demo" / "model"))


def sample_pixels():
    from runtime.model.preprocess import preprocess

    how = manifests.load(DEMO).preprocessing
    return [preprocess(path.read_bytes(), how) for path in sorted(SAMPLES.glob("*.png"))]


def outputs(folder, name, pixels):
    session = ort.InferenceSession(folder / name)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))


def test_the_demo_engine_has_every_combination_proven_on_its_scenes():
    combinations = {c.name: c for c in manifests.load(DEMO).combinations}
    assert EXACT in combinations
    assert "int8/int8/int8" in combinations
    for c in combinations.values():
        assert c.agreement >= gate.least_agreement(c.encoder)
        assert c.images >= 64


@pytest.mark.parametrize("combination", [c.name for c in manifests.load(DEMO).combinations])
def test_every_combination_captions_the_samples(combination):
    engine = Engine.open(DEMO, EngineConfig(provider="cpu", precision=combination, slots=5))
    assert engine.self_test == "passed" and "self-test passed" in engine.runs_on
    assert engine.self_test_seconds > 0
    said = json.loads((SAMPLES / "captions.json").read_text())
    paths = sorted(SAMPLES.glob("*.png"))
    captions = engine.generate([path.read_bytes() for path in paths])
    right = sum(c.text == said[p.name]["caption"] for c, p in zip(captions, paths, strict=True))
    assert right >= (12 if combination == EXACT else 11)


def test_an_int8_prefix_is_the_float_one_rounded_by_channel():
    """With the very scales that the decoder multiplies by again."""
    pixels = np.stack(sample_pixels()[:2])
    exact = outputs(DEMO, "encoder.onnx", pixels)
    rounded = outputs(DEMO, "encoder.kv8.onnx", pixels)
    scales = {i.name: i for i in onnx.load(DEMO / "decoder.kv8.onnx").graph.initializer}
    for name, value in exact.items():
        scale = numpy_helper.to_array(scales[f"{name.replace('image', 'cache')}.scale"])
        assert scale.shape == (value.shape[1] * value.shape[3],)
        expected = np.rint(value / scale.reshape(1, value.shape[1], 1, value.shape[3]))
        assert np.abs(expected.clip(-128, 127) - rounded[name]).max() <= 1
        assert (expected.clip(-128, 127) == rounded[name]).mean() > 0.99


def test_all_variants_share_their_weights():
    variants = manifests.load(DEMO).variants
    assert all((DEMO / variant.file).stat().st_size < 700_000 for variant in variants)
    weights = {v.file: v.weights for v in variants if v.weights > 100_000}
    assert len(weights) == len(variants) - len(manifests.HELPERS)
    once = {v.weights for v in variants}  # variants of one precision share all but a few scales
    assert (DEMO / "weights.data").stat().st_size < sum(once) / 2


def test_weights_are_stored_once_and_as_fp16_only_where_nothing_is_lost(tmp_path):
    rng = np.random.default_rng(0)
    exact, other = (rng.normal(size=(64, 64)).astype(np.float32) for _ in range(2))
    exact = exact.astype(np.float16).astype(np.float32)

    def graph(name, *weights):
        nodes = [helper.make_node("Add", [f"w{n}", "x"], [f"y{n}"]) for n in range(len(weights))]
        info = helper.make_tensor_value_info
        made = helper.make_graph(
            nodes, name, [info("x", TensorProto.FLOAT, [64])],
            [info(f"y{n}", TensorProto.FLOAT, [64, 64]) for n in range(len(weights))],
            [numpy_helper.from_array(w, f"w{n}") for n, w in enumerate(weights)],
        )  # fmt: skip
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(made, opset_imports=opset, ir_version=8)
        onnx.save_model(model, tmp_path / name)

    graph("a.onnx", exact, other)
    graph("b.onnx", other, exact)
    taken = pool(tmp_path, ["a.onnx", "b.onnx"])
    assert taken == {"a.onnx": 2 * exact.nbytes, "b.onnx": 2 * exact.nbytes}
    assert (tmp_path / "weights.data").stat().st_size == exact.nbytes // 2 + other.nbytes
    for name, weights in (("a.onnx", (exact, other)), ("b.onnx", (other, exact))):
        session = ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        found = session.run(None, {"x": np.zeros(64, np.float32)})
        assert all(np.array_equal(f, w) for f, w in zip(found, weights, strict=True))


def test_a_variant_that_says_something_else_is_left_out_and_deleted(
    demo_checkpoint, tmp_path, monkeypatch, capsys
):
    """An int8 cache whose scales are wrong must not get through the gate."""
    real = building.cache_scales
    monkeypatch.setattr(
        building, "cache_scales", lambda *a: {k: v / 50 for k, v in real(*a).items()}
    )
    monkeypatch.setattr(gate, "_SEARCHED", 1)
    pixels = (sample_pixels() * 2)[:16]
    manifest = build(demo_checkpoint, tmp_path / "engine", Proof(1, 6, tuple(pixels)))
    caches = {c.cache for c in manifest.combinations}
    assert caches == {"float32"}
    assert not list((tmp_path / "engine").glob("*.kv8.onnx"))
    assert "fp32/fp32/int8: 0 of 16 captions" in capsys.readouterr().out
    assert manifests.load(tmp_path / "engine") == manifest


def test_without_pictures_a_trained_model_gets_fp32_only(demo_checkpoint, tmp_path, capsys):
    manifest = build(demo_checkpoint, tmp_path / "engine", Proof(1, 2))
    assert [c.name for c in manifest.combinations] == [EXACT]
    assert "give --images a folder with 16 or more" in capsys.readouterr().out


def test_random_weights_are_never_called_proven(small):
    combinations = manifests.load(small[1]).combinations
    assert len(combinations) == 12
    assert [c.agreement for c in combinations] == [1.0] + [None] * 11


def test_the_gate_does_not_judge_a_gpu_by_the_processor(small):
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    refused = pytest.raises(ExportError, match="can't use the GPU")
    with refused, pytest.warns(UserWarning, match="not in available provider names"):
        OnnxGraphs(small[1] / "encoder.onnx", small[1] / "decoder.onnx", cuda=True)


def test_calibration_covers_image_and_text(small, tmp_path):
    checkpoint, folder = small
    cases = [Case(generated(np.random.default_rng(i), checkpoint.sizes), [101]) for i in range(3)]
    scales = building.cache_scales(checkpoint, folder, cases, new_tokens=4)
    graphs = OnnxGraphs(folder / "encoder.onnx", folder / "decoder.onnx")
    image = graphs.encode(np.stack([c.pixels for c in cases]))
    largest = {}
    list(
        caption(
            graphs, checkpoint.sizes, checkpoint.tokens, cases, 4, lambda c, _: largest.update(c)
        )
    )
    wider = 0
    for name, scale in scales.items():
        of_image = np.abs(image[f"image.{name}"]).max(axis=(0, 2)) / 127
        assert (scale >= of_image * 0.999).all()
        wider += int((scale > of_image * 1.001).sum())
    assert wider, "the text's keys and values must count too"


def test_a_corrupt_variant_is_named_before_anything_starts(tmp_path):
    folder = shutil.copytree(DEMO, tmp_path / "engine")
    data = bytearray((folder / "weights.data").read_bytes())
    data[1000] ^= 1
    (folder / "weights.data").write_bytes(data)
    with pytest.raises(manifests.EngineFolderError, match=r"weights\.data is damaged"):
        Engine.open(folder)
