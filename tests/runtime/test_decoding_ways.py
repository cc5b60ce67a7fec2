"""How texts are drawn, and what of it a request may ask for."""

from dataclasses import replace as changed

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decoding.beams import Beams
from runtime.decoding.continuation import drawn
from runtime.engine import Engine
from runtime.errors import ComputationFailed, InvalidRequest
from runtime.limits import Limits
from runtime.planning.config import EngineConfig
from runtime.request import FinishReason, SamplingParams
from tests.support.fakes import FakeTokenizer, fake_engine, image

DRAWS = 20_000


def shares(logits: np.ndarray, **sampling) -> np.ndarray:
    """The share of draws of each candidate."""
    asked = SamplingParams(1, **sampling)
    places = [drawn(logits, asked, draw) for draw in np.random.default_rng(0).random(DRAWS)]
    return np.bincount(places, minlength=len(logits)) / DRAWS


def likely(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp(logits / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_by_temperature(temperature):
    logits = np.array([2.0, 1.5, 1.0, 0.2, -1.0])
    found = shares(logits, temperature=temperature)
    expected = likely(logits, temperature)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / DRAWS)
    for other in (0.8 * temperature, 1.25 * temperature):  # a wrong one would show
        assert np.abs(found - likely(logits, other)).max() > 4 * np.sqrt(0.25 / DRAWS)


def test_top_k_and_top_p_cut_off_the_rest():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert (shares(logits, temperature=1.0, top_k=2) > 0).tolist() == [True, True, False, False]
    for top_p, kept in ((0.3, 1), (0.41, 2), (0.69, 2), (0.75, 3), (1.0, 4)):
        found = shares(logits, temperature=1.0, top_p=top_p)
        assert (found > 0).sum() == kept
        expected = likely(logits[:kept], 1.0)
        assert np.abs(found[:kept] - expected).max() < 4 * np.sqrt(0.25 / DRAWS)


def sampled(engine: Engine, number: int, seed: int, n: int = 2) -> list[tuple[int, ...]]:
    asked = {"temperature": 1.5, "seed": seed, "n": n, "max_new_tokens": 8}
    [caption] = engine.generate([image(number)], **asked)
    return [each.token_ids for each in (caption, *caption.others)]


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch():
    alone = [sampled(fake_engine(), n, seed=n) for n in range(6)]
    engine = fake_engine(EngineConfig(slots=16, patience=0))
    requests = [
        engine.request(image(n), temperature=1.5, seed=n, n=2, max_new_tokens=8) for n in range(6)
    ]
    for request in requests:
        engine.submit(request)
    found = {}
    while not engine.idle:
        found |= {output.id: output for output in engine.step()}
    for request, expected in zip(requests, alone, strict=True):
        caption = engine.caption(request, found[request.id])
        assert [each.token_ids for each in (caption, *caption.others)] == expected
    assert len({tuple(each) for each in alone}) > 1
    assert all(first != second for first, second in alone), "each of the n is drawn by itself"
    assert sampled(fake_engine(), 1, seed=99) != alone[1]


def test_who_names_no_seed_gets_one_that_is_kept():
    engine = fake_engine()
    one, other = (engine.request(image(1), temperature=1.0).sampling.seed for _ in range(2))
    assert one != other


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_beams": 9}, "num_beams must be between 1 and 8"),
        ({"top_k": 65, "temperature": 1.0}, "top_k must be between 1 and 64"),
        ({"repetition_penalty": 0.5}, "repetition_penalty must be between 1 and"),
        ({"num_beams": 2, "temperature": 1.0}, "temperature goes with num_beams 1"),
        ({"top_p": 0.5}, "top_p has no effect without a temperature"),
        ({"seed": 1}, "seed has no effect without a temperature"),
        ({"length_penalty": 2.0}, "length_penalty has no effect without num_beams"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping must be"),
        ({"n": 2}, "n is 2: give num_beams"),
        ({"n": 3, "temperature": 1.0, "logprobs": 20}, "n times logprobs must be 40 or less"),
        ({"n": 3, "num_beams": 2}, "n is 3: give num_beams"),
        ({"num_beams": 4}, "num_beams is 4, and there are 3 slots"),
    ],
)
def test_what_is_contradictory_is_named(asked, message):
    with pytest.raises(InvalidRequest, match=message):
        Limits(FakeTokenizer(), 32, slots=3).check(None, asked)


def test_what_several_texts_are_the_best_of_can_not_be_streamed():
    with pytest.raises(InvalidRequest, match="stream goes with num_beams and n of 1"):
        fake_engine().request(image(1), num_beams=2, stream=True)


@pytest.mark.parametrize("penalty", [-10.0, 10.0])
@pytest.mark.parametrize("early", [True, False, "never"])
def test_the_strangest_penalty_still_ends_in_a_caption(penalty, early):
    engine = fake_engine()
    asked = {"num_beams": 3, "n": 3, "length_penalty": penalty, "early_stopping": early}
    [caption] = engine.generate([image(3)], max_new_tokens=32, **asked)
    assert len(texts([caption])) == 3


def test_what_needs_more_slots_than_there_are_is_never_queued():
    engine = fake_engine()
    request = fake_engine(EngineConfig(slots=8)).request(image(1), num_beams=4)
    with pytest.raises(InvalidRequest, match="takes 4 slots, and there are 3"):
        engine.submit(request)
    assert engine.idle


def test_a_way_of_decoding_that_fails_fails_alone(monkeypatch, caplog):
    def failing(self, rows):
        raise IndexError("an error of ours")

    expected = texts(fake_engine().generate([image(1)]))
    monkeypatch.setattr(Beams, "advance", failing)
    engine = fake_engine(EngineConfig(slots=4, patience=0))
    bad, good = engine.request(image(1), num_beams=2), engine.request(image(1))
    for request in (bad, good):
        engine.submit(request)
    found = {}
    while not engine.idle:
        found |= {output.id: output for output in engine.step()}
    assert found[bad.id].finish_reason is FinishReason.ERROR
    with pytest.raises(ComputationFailed, match="log tells"):
        engine.caption(bad, found[bad.id])
    assert [found[good.id].token_ids] == expected
    assert "an error of ours" in caplog.text


ASKED = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 4), st.booleans(), st.integers(0, 5)),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(ASKED, st.integers(4, 6), st.integers(1, 4))
def test_beams_and_others_in_any_order_say_what_each_says_alone(asked, slots, batch):
    """And none of them waits for good, however many slots it needs."""
    config = EngineConfig(slots=slots, encode_batch=batch, patience=0)
    engine, expected, found, step = fake_engine(config), {}, {}, 0
    waiting = sorted(asked, key=lambda each: each[3])
    while waiting or not engine.idle:
        assert step < 2000
        while waiting and waiting[0][3] <= step:
            number, rows, beams, _ = waiting.pop(0)
            way = {"num_beams": rows} if beams else {"n": rows, "temperature": 1.0, "seed": number}
            request = engine.request(image(number), max_new_tokens=6, **way)
            engine.submit(request)
            alone = fake_engine(changed(config, slots=4))
            expected[request.id] = texts(alone.generate([image(number)], max_new_tokens=6, **way))
        for output in engine.step():
            found[output.id] = [output.token_ids, *(each.token_ids for each in output.others)]
        step += 1
    assert found == expected


def texts(captions) -> list[tuple[int, ...]]:
    [caption] = captions
    return [each.token_ids for each in (caption, *caption.others)]
