"""Images side by side in the encoder: the same numbers, each handed over once."""

import threading

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.execution.encoder import Encoder
from runtime.model import manifest as manifests
from runtime.model.manifest import EXACT
from runtime.planning.config import EngineConfig
from runtime.providers.session import Placement

NAMES = ["image.0.key", "image.1.value"]


@pytest.fixture(scope="module")
def graph(small):
    folder = small[1]
    manifest = manifests.load(folder)
    variant = manifest.variant("encoder", manifest.combination(EXACT))
    return folder / variant.file, Placement("cpu", row=manifest.sizes.pixels)


@pytest.fixture(scope="module")
def images(graph):
    return list(np.random.default_rng(0).integers(0, 256, (7, *graph[1].row), np.uint8))


def encoded(graph, streams, images):
    """Outputs of each image, and the names of the threads that delivered them."""
    found, threads = {}, set()

    def put(index, outputs):
        assert index not in found
        found[index] = [np.array(output) for output in outputs]
        threads.add(threading.current_thread().name.rpartition("_")[0])

    Encoder(*graph, streams, NAMES).encode(images, put)
    return [found[index] for index in range(len(images))], threads


@pytest.mark.parametrize("streams", [2, 3, 4, 16])
def test_streams_say_what_one_call_says(graph, images, streams):
    expected, _ = encoded(graph, 1, images)
    for ours, theirs in zip(encoded(graph, streams, images)[0], expected, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, its, atol=1e-5)


@pytest.mark.parametrize(
    ("streams", "count", "expected"),
    [(4, 2, {""}), (4, 3, {"encode"}), (4, 5, {"encode", ""}), (2, 1, {""}), (1, 7, {""})],
)
def test_too_few_images_for_the_streams_share_all_threads(graph, images, streams, count, expected):
    assert encoded(graph, streams, images[:count])[1] == expected


def test_a_failure_is_raised_once_no_stream_writes_any_more(graph, images):
    done = []

    def put(index, _):
        if index == 0:
            raise MemoryError("no room")
        done.append(index)

    encoder = Encoder(*graph, 3, NAMES)
    with pytest.raises(MemoryError, match="no room"):
        encoder.encode(images[:3], put)
    assert sorted(done) == [1, 2]
    encoder.encode(images[1:3], lambda index, _: done.append(index))
    assert sorted(done[2:]) == [0, 1]


def test_captions_do_not_depend_on_the_streams(small, images):
    def captions(batch):
        config = EngineConfig(provider="cpu", precision=EXACT, threads=4, encode_batch=batch)
        engine = Engine.open(small[1], config)
        assert ("in 4 streams" in engine.runs_on) == (batch == 4)
        return [c.token_ids for c in engine.generate(images, max_new_tokens=12, ignore_eos=True)]

    assert captions(4) == captions(1)
