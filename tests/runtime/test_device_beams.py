"""Beams that a device chooses within a burst say what beams that the host chooses say."""

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest

from export.pictures import generated
from runtime.decoding.candidates import BeamStep
from runtime.execution import beam_search
from runtime.execution.base import Candidates
from runtime.execution.device import DeviceRunner
from runtime.model.manifest import UNFORCED
from runtime.request import FinishReason
from tests.runtime.test_device import FUSED, OnHost, caches, engine, put_caches
from tests.support.fakes import drained

WAYS = [
    {"num_beams": 4},
    {"num_beams": 3, "n": 2, "length_penalty": 0.0, "early_stopping": "never"},
    {},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 4, "ignore_eos": True},
    {"num_beams": 5, "length_penalty": -1.0},
]


class Stepwise(DeviceRunner):
    """Takes a burst with beams step by step, and has NumPy choose them: in the same batches.

    groups: beams, images, and numbers of end tokens of each search.
    """

    groups: ClassVar[set[tuple[int, int, int]]] = set()

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        self.left = None
        if not searches:
            return super().decode(tokens, fed, forced, candidates)
        scores = [search.scores for search in searches]
        steps = [[[] for _ in search.slots] for search in searches]
        found = []
        for step in range(1 + len(forced)):
            ages = [age + step for age in fed]
            last = super().decode(tokens, ages, (), 16)  # twice as many as there are beams
            best = self._rings.logprobs.fetch().reshape(self._rings.shape)[1, : len(tokens), None]
            logprobs = last.logprobs[0] - last.logprobs[0][:, :1] + best
            found.append((last.ids[0], logprobs))
            chosen = last.ids[0][:, 0].tolist()
            if step < len(forced):
                given = zip(chosen, forced[step], strict=True)
                chosen = [own if token == UNFORCED else token for own, token in given]
            moves = []
            for number, search in enumerate(searches):
                self.groups.add((search.scores.shape[1], len(search.slots), len({*search.stops})))
                if step < search.forced:
                    continue
                following = []
                for image, slots in enumerate(search.slots):
                    rows = last.ids[0][slots], logprobs[slots]
                    one = best_of(*rows, scores[number][image], search.stops[image])
                    steps[number][image].append(one)
                    ends = [one.ids[k] == search.stops[image] for k in one.kept]
                    going_on = np.array([one.scores[k] for k in one.kept], np.float32)
                    following.append(going_on + np.array(ends) * np.float32(-1e9))
                    for slot, k in zip(slots, one.kept, strict=True):
                        chosen[slot] = one.ids[k]
                        moves.append((slots[one.parents[k]], slot))
                scores[number] = np.array(following, np.float32)
            if moves:
                self.reorder(moves, max(ages) + 1)
            tokens = chosen
        taken = 1 + len(forced)
        going_on = [
            replace(search, scores=after, forced=0, fed=search.fed + taken)
            for search, after in zip(searches, scores, strict=True)
        ]
        self.left = tokens, [age + taken for age in fed], going_on
        ids, logprobs = (np.stack(each)[..., :1] for each in zip(*found, strict=True))
        return Candidates(ids, logprobs, searches=steps)

    def proceed(self, steps):
        if self.left is None:
            return super().proceed(steps)
        tokens, fed, searches = self.left
        forced = [[UNFORCED] * len(tokens)] * (steps - 1)
        return self.decode(tokens, fed, forced, searches=searches)


def best_of(ids, logprobs, scores, stop):
    beams = len(scores)
    totals = logprobs[:, : 2 * beams] + scores[:, None]
    order = np.argsort(-totals, axis=None, kind="stable")[: 2 * beams]
    parents, places = np.divmod(order, 2 * beams)
    best, chosen = totals.reshape(-1)[order], ids[parents, places]
    kept = np.argsort(-(best + (chosen == stop) * np.float32(-1e9)), kind="stable")[:beams]
    taken = chosen, parents, logprobs[parents, places], best, kept
    return BeamStep(*(each.tolist() for each in taken))


@pytest.mark.parametrize("text_tokens", [13, 40])
def test_images_of_as_many_beams_are_searched_together(half, text_tokens):
    """Groups that are padded, of images of unequal ages and ends; text room that is used up."""
    said = []
    for kind in (Stepwise, DeviceRunner):
        it = engine(half, kind, FUSED, slots=20, text_tokens=text_tokens)
        rng, waiting = np.random.default_rng(4), []
        [usual] = it.generate([generated(rng, it.manifest.sizes)], max_new_tokens=9)
        # Random weights hardly ever say the end token: take one that they do say.
        often = replace(it.manifest.tokens, eos=usual.token_ids[4])
        it.manifest = replace(it.manifest, tokens=often)
        for n in range(26):
            prompt = " ".join(["w7", "w9", "w3"][: (n // 5) % 4])
            way = {"num_beams": 4 if n < 13 else 3, "ignore_eos": n % 2 == 0, "n": 1 + n % 3}
            most = min(text_tokens - 4, 3 + n % 9)
            image = generated(rng, it.manifest.sizes)
            waiting.append(it.request(image, prompt, max_new_tokens=most, **way))
        order, outputs = [request.id for request in waiting], {}
        while waiting or not it.idle:
            for request in waiting[: 1 + len(outputs) % 3]:
                it.submit(request)
                waiting.remove(request)
            outputs |= {output.id: output for output in it.step()}
        said.append([(outputs[n].completion, *outputs[n].others) for n in order])
    assert {(4, 3, 2), (3, 3, 2)} <= Stepwise.groups  # in buckets of 4
    assert {each.finish_reason for texts in said[0] for each in texts} > {FinishReason.STOP}
    for ours, theirs in zip(*said, strict=True):
        assert [each.token_ids for each in ours] == [each.token_ids for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.finish_reason == other.finish_reason
            assert np.allclose(one.logprobs, other.logprobs, atol=1e-5)


def searched(it, ways):
    """All texts and scores of images that arrive one after another, and the bursts of beams."""
    rng, bursts = np.random.default_rng(9), set()
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
    values = caches(it)
    values[:, slot, :, 0] = np.nan
    put_caches(it, values)
    said = {}
    while not it.idle:
        said |= {output.id: output for output in it.step()}
    assert said[broken.id].finish_reason is FinishReason.FAILED
    assert said[whole.id].token_ids == alone.token_ids
    assert [caption.token_ids for caption in it.generate(images[1:], **asked)] == [alone.token_ids]
    assert drained(it) == {}
