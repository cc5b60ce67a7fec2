"""What is said of an image does not depend on what it shares a batch with, bit for bit."""

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime.engine import Engine
from runtime.model.manifest import read
from runtime.model.preprocess import preprocess
from runtime.planning.config import EngineConfig
from runtime.providers.session import Placement, open_session
from tests.support.paths import DEMO, SAMPLES

_NAMES = ("owl.png", "eagle-shark.png", "donuts.png", "cats.png")
EIGHT_BITS = ("int8/int8/int8", "int8/int8/float32")


@pytest.fixture(scope="module")
def pictures():
    how = read(DEMO).preprocessing
    return [preprocess((SAMPLES / name).read_bytes(), how).astype(np.float32) for name in _NAMES]


@pytest.fixture(scope="module", params=EIGHT_BITS)
def engine(request):
    return Engine.open(DEMO, EngineConfig(provider="cpu", precision=request.param, slots=8))


def blend(pictures, one, other, share):
    """A blend of two pictures, whose caption a small change can flip."""
    return (share * pictures[one] + (1 - share) * pictures[other]).astype(np.uint8)


BLENDS = st.tuples(
    st.integers(0, len(_NAMES) - 1), st.integers(0, len(_NAMES) - 1), st.floats(0.35, 0.65)
)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chosen=st.lists(BLENDS, min_size=2, max_size=8))
def test_a_caption_is_the_same_alone_and_among_others(engine, pictures, chosen):
    images = [blend(pictures, *each) for each in chosen]
    together = [caption.token_ids for caption in engine.generate(images)]
    alone = [engine.generate([image])[0].token_ids for image in images]
    assert together == alone


@pytest.mark.parametrize("cache", ["", ".kv8"])
def test_every_row_of_the_8_bit_graphs_is_computed_as_if_alone(pictures, cache):
    encoder, decoder = (
        open_session(DEMO / f"{graph}.int8{cache}.onnx", Placement("cpu"))
        for graph in ("encoder", "decoder")
    )
    rng = np.random.default_rng(0)
    pixels = np.stack([*pictures, *(rng.integers(0, 256, (4, *pictures[0].shape)))]).astype(
        np.uint8
    )
    names = [output.name for output in encoder.get_outputs()]

    def prefix(rows):
        return dict(zip(names, encoder.run(names, {"pixels": pixels[rows]}), strict=True))

    def logits(rows):
        feeds = {
            "token_ids": np.array([[7 + row] for row in rows]),
            "lengths": np.full(len(rows), positions, np.int32),
            "total_length": np.array([positions + 1], np.int32),
            "candidates": np.ones(1, np.int64),
        }
        for name, value in together.items():
            past = np.zeros((len(rows), *value.shape[1:]), value.dtype)
            past = np.concatenate([value[rows], past[:, :, :4]], axis=2)
            feeds[name.replace("image.", "past_key_values.")] = past
        return decoder.run(["logits"], feeds)[0]

    everyone = list(range(len(pixels)))
    together = prefix(everyone)
    positions = together[names[0]].shape[2]
    said = logits(everyone)
    for row in everyone:
        alone = prefix([row])
        assert all(np.array_equal(alone[name][0], together[name][row]) for name in names)
        assert np.array_equal(logits([row])[0], said[row])


def test_8_bit_products_do_not_saturate_on_any_processor(tmp_path):
    weights, activations = np.full((64, 16), 127, np.int8), np.full((2, 64), 255, np.uint8)
    one, middle, zero = (np.array(*of) for of in ((1, np.float32), (128, np.uint8), (0, np.int8)))
    constants = {"weights": weights, "one": one, "middle": middle, "zero": zero}
    node = helper.make_node(
        "MatMulIntegerToFloat",
        ["activations", "weights", "one", "one", "middle", "zero"],
        ["sums"],
        domain="com.microsoft",
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("activations", TensorProto.UINT8, activations.shape)],
        [helper.make_tensor_value_info("sums", TensorProto.FLOAT, (2, 16))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "product.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=domains, ir_version=9), path)
    [sums] = open_session(path, Placement("cpu")).run(None, {"activations": activations})
    assert (sums == 64 * 127 * (255 - 128)).all()
