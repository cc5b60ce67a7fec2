"""Beams that a device chooses within a burst say what beams that the host chooses say."""

import numpy as np
import pytest

from export.pictures import generated
from runtime.execution import beam_search
from runtime.execution.device import DeviceRunner
from runtime.request import FinishReason
from tests.fakes import drained
from tests.test_device import FUSED, OnHost, engine

WAYS = [
    {"num_beams": 4},
    {"num_beams": 3, "n": 2, "length_penalty": 0.0, "early_stopping": "never"},
    {},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 4, "ignore_eos": True},
    {"num_beams": 5, "length_penalty": -1.0},
]


def searched(it, ways):
    """All texts and scores of images that arrive one after another, and the bursts of beams."""
    rng, bursts = np.random.default_rng(8), set()
    requests = [
        it.request(
            generated(rng, it.manifest.sizes),
            " ".join(["w7", "w9", "w3"][: n % 4]),
            max_new_tokens=3 + n % 7,
            **way,
        )
        for n, way in enumerate(ways)
    ]
    outputs, waiting = {}, [*requests]
    while waiting or not it.idle:
        for request in waiting[:2]:
            it.submit(request)
        del waiting[:2]
        before = {s: s.fed for s in it.scheduler.running if len(s.slots) > 1}
        outputs |= {output.id: output for output in it.step()}
        bursts |= {s.fed - fed for s, fed in before.items()}
    said = [outputs[request.id] for request in requests]
    return [(each.completion, *each.others) for each in said], bursts


@pytest.mark.parametrize("most", [1, 1024])
def test_beams_of_a_device_say_what_beams_of_the_host_say(half, monkeypatch, most):
    """most: bindings that are kept; with one, each step binds anew."""
    monkeypatch.setattr(beam_search, "_MOST_BINDINGS", most)
    expected, single = searched(engine(half, OnHost, FUSED, slots=12), WAYS * 3)
    found, bursts = searched(engine(half, DeviceRunner, FUSED, slots=12), WAYS * 3)
    assert single == {1}
    assert max(bursts) == 4, "no beams were chosen on the device"
    for ours, theirs in zip(found, expected, strict=True):
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        assert [each.finish_reason for each in ours] == [each.finish_reason for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert np.allclose(one.logprobs, other.logprobs, atol=5e-3)
    assert len({texts[0].token_ids for texts in found}) > 8


def test_beams_beside_what_the_host_must_choose_are_chosen_there(half):
    ways = [{"num_beams": 4}, {"temperature": 1.0, "seed": 3}, {"num_beams": 3}] * 3
    it = engine(half, DeviceRunner, FUSED, slots=12)
    found, _ = searched(it, ways)
    expected, _ = searched(engine(half, OnHost, FUSED, slots=12), ways)
    assert [[each.token_ids for each in texts] for texts in found] == [
        [each.token_ids for each in texts] for texts in expected
    ]


def test_beams_whose_numbers_break_down_fail_alone(half):
    it = engine(half, DeviceRunner, FUSED, slots=8)
    rng = np.random.default_rng(1)
    images = [generated(rng, it.manifest.sizes) for _ in range(2)]
    asked = {"num_beams": 4, "max_new_tokens": 9, "ignore_eos": True}
    [alone] = it.generate(images[1:], **asked)
    broken, whole = (it.request(image, **asked) for image in images)
    it.submit(broken)
    it.submit(whole)
    it.step()  # queues the images
    [slot, *_] = it.scheduler.running[0].slots
    for cache in it.runner.arena.caches.values():
        values = cache.fetch()
        values[slot, :, 0] = np.nan
        cache.upload(values, it.runner._stream)
    said = {}
    while not it.idle:
        said |= {output.id: output for output in it.step()}
    assert said[broken.id].finish_reason is FinishReason.FAILED
    assert said[whole.id].token_ids == alone.token_ids
    assert [caption.token_ids for caption in it.generate(images[1:], **asked)] == [alone.token_ids]
    assert drained(it) == {}
