"""On a GPU (`make gpu-check`): it says what the processor says, and stays within its memory."""

import json
import time

import pytest

from export.build import Proof, build
from export.gate import LEAST_AGREEMENT
from export.random_weights import from_config
from runtime.engine import Engine
from runtime.errors import ProviderError
from runtime.execution.device import DeviceRunner
from runtime.planning.config import EngineConfig
from runtime.providers import cuda, registry
from runtime.providers.gpu import require_gpu
from tests.runtime.test_device import FUSED, OnHost, captions, engine
from tests.runtime.test_device_beams import WAYS, searched
from tests.support.checkpoints import SHAPES
from tests.support.paths import DEMO, SAMPLES
from tests.support.varied import agreement


def obstacle(name: str) -> str | None:
    try:
        registry.require(name)
    except ProviderError as cause:
        return str(cause)
    return None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(obstacle("cuda") is not None, reason=f"no CUDA: {obstacle('cuda')}"),
]


@pytest.fixture(scope="module")
def samples():
    said = json.loads((SAMPLES / "captions.json").read_text())
    return {name: ((SAMPLES / name).read_bytes(), said[name]["caption"]) for name in said}


@pytest.mark.parametrize("graphs", [True, False])
def test_cuda_captions_the_samples_word_for_word(samples, graphs):
    engine = Engine.open(DEMO, EngineConfig(provider="cuda", slots=5, cuda_graphs=graphs))
    assert isinstance(engine.runner, DeviceRunner)
    images, expected = zip(*samples.values(), strict=True)
    assert [c.text for c in engine.generate(images)] == list(expected)


def test_the_gate_holds_for_the_gpus_own_arithmetic():
    engine = Engine.open(DEMO, EngineConfig(provider="cuda"))
    assert agreement(engine, 400) >= LEAST_AGREEMENT


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """An engine with heads of 64, as git-base has: another kernel than the demo model's 32."""
    folder = tmp_path_factory.mktemp("heads") / "engine"
    build(from_config("heads", SHAPES["heads"], seed=1), folder, Proof(2, 8, target="cuda"))
    return folder


@pytest.mark.parametrize(("graphs", "xqa"), [(True, "1"), (False, "1"), (True, "0")])
def test_heads_of_64_say_the_same_as_on_the_processor(heads, graphs, xqa, monkeypatch):
    """Unequal ages, forced prompts, slots that are used again; random weights sway easily.

    xqa: whether the kernel that heads of 64 have is on; read as a session is opened.
    """
    monkeypatch.setenv("ORT_ENABLE_XQA", xqa)
    settings = {"slots": 6, "encode_batch": 4, "patience": 0}
    on_gpu = Engine.open(heads, EngineConfig(provider="cuda", cuda_graphs=graphs, **settings))
    expected, _ = captions(engine(heads, OnHost, FUSED), heads)
    said, bursts = captions(on_gpu, heads)
    assert max(bursts) > 1
    assert sum(a == b for a, b in zip(said, expected, strict=True)) >= 18


def test_beams_that_the_gpu_chooses_are_those_of_the_processor(heads):
    on_gpu = Engine.open(heads, EngineConfig(provider="cuda", slots=12, encode_batch=4, patience=0))
    found, bursts = searched(on_gpu, WAYS * 4)
    expected, _ = searched(engine(heads, OnHost, FUSED, slots=12), WAYS * 4)
    assert max(bursts) > 1
    same = [a[0].token_ids == b[0].token_ids for a, b in zip(found, expected, strict=True)]
    assert sum(same) >= 20


def test_tensorrt_captions_the_samples_word_for_word(samples):
    reason = obstacle("tensorrt")
    if reason:
        pytest.skip(reason)
    engine = Engine.open(DEMO, EngineConfig(provider="tensorrt", slots=5))
    images, expected = zip(*samples.values(), strict=True)
    assert [c.text for c in engine.generate(images)] == list(expected)


def test_mixed_batches_do_not_grow_memory(samples):
    engine = Engine.open(DEMO, EngineConfig(provider="cuda", slots=16))
    images = [image for image, _ in samples.values()]

    def some():
        for count in range(1, len(images) + 1):
            engine.generate(images[:count])

    for _ in range(5):
        some()
    before = require_gpu(cuda.major()).free
    for _ in range(50):
        some()
    assert before - require_gpu(cuda.major()).free < 8 << 20


def test_pauses_between_requests_do_not_grow_memory(samples):
    """Each thread that runs a graph has a context of its own, and captures anew."""
    engine = Engine.open(DEMO, EngineConfig(provider="cuda", slots=4))
    [image, *_] = [image for image, _ in samples.values()]
    engine.generate([image])
    before = require_gpu(cuda.major()).free
    for _ in range(4):
        time.sleep(1.5)
        engine.generate([image])
    assert before - require_gpu(cuda.major()).free < 8 << 20


def test_more_slots_than_the_memory_holds_are_refused():
    with pytest.raises(ProviderError, match="do not fit"):
        Engine.open(DEMO, EngineConfig(provider="cuda", slots=4096, memory_share=0.01))
