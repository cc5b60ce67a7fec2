"""On a GPU (`make gpu-check`): it says what the processor says, and stays within its memory."""

import json

import pytest

from runtime import providers
from runtime.config import EngineConfig
from runtime.device_runner import DeviceRunner
from runtime.engine import Engine
from runtime.errors import ProviderError
from runtime.gpu import require_gpu
from runtime.providers import cuda_major
from tests.conftest import DEMO, SAMPLES


def obstacle(name: str) -> str | None:
    try:
        providers.require(name)
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
    before = require_gpu(cuda_major()).free
    for _ in range(50):
        some()
    assert before - require_gpu(cuda_major()).free < 8 << 20


def test_more_slots_than_the_memory_holds_are_refused():
    with pytest.raises(ProviderError, match="do not fit"):
        Engine.open(DEMO, EngineConfig(provider="cuda", slots=10_000_000))
