"""The decode loop on a runner whose answers depend on each slot's cache: nothing is mixed up."""

import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from runtime.engine import Engine
from runtime.errors import InvalidImage, InvalidRequest
from runtime.observer import Observer
from runtime.planning.config import EngineConfig
from runtime.request import FinishReason, GenerationRequest, SamplingParams
from tests.support.fakes import (
    EOS,
    MANIFEST,
    FakeRunner,
    FakeTokenizer,
    drained,
    fake_engine,
    image,
)

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 9),  # image
        st.lists(st.integers(3, 9), max_size=4),  # prompt
        st.integers(1, 8),  # max_new_tokens
        st.integers(0, 6),  # steps before it arrives
    ),
    min_size=1,
    max_size=14,
)
CONFIGS = st.builds(
    EngineConfig,
    slots=st.integers(1, 5),
    encode_batch=st.integers(1, 4),
    refill=st.booleans(),
)


def prompt(words: list[int]) -> str:
    return " ".join(map(str, words))


def ask(engine: Engine, number: int, words: list[int], most: int, **more) -> GenerationRequest:
    return engine.request(image(number), prompt(words), max_new_tokens=most, **more)


def alone(number: int, words: list[int], most: int) -> tuple[int, ...]:
    [caption] = fake_engine().generate([image(number)], [prompt(words)], max_new_tokens=most)
    return caption.token_ids


@settings(deadline=None, max_examples=150)
@given(REQUESTS, CONFIGS, st.integers(1, 4), st.booleans())
def test_any_order_of_arrival_says_what_each_request_alone_says(requests, config, burst, overlaps):
    engine = fake_engine(config, burst)
    engine.runner.overlaps = overlaps
    arriving = sorted(requests, key=lambda r: r[3])
    expected, finished, step = {}, {}, 0
    while arriving or not engine.idle:
        while arriving and arriving[0][3] <= step:
            number, words, most, _ = arriving.pop(0)
            request = replace(ask(engine, number, words, most), stream=step % 2)
            engine.submit(request)
            expected[request.id] = alone(number, words, most)
            finished[request.id] = ()
        for output in engine.step():
            finished[output.id] += output.token_ids
        step += 1
    assert finished == expected


class Buckets(FakeRunner):
    """Steps of 1, 2, 4 or 8 rows, as a device has them captured."""

    def bucket(self, rows):
        return 1 << (rows - 1).bit_length()


@settings(deadline=None, max_examples=100)
@given(REQUESTS, st.integers(1, 8), st.integers(1, 4))
def test_holes_change_nothing_and_are_closed_only_for_a_smaller_bucket(requests, slots, burst):
    engine = fake_engine(EngineConfig(slots=slots, patience=0))
    engine.runner = runner = Buckets(burst)
    expected, rows = {}, []
    for number, words, most, _ in requests:
        engine.submit(request := ask(engine, number, words, most))
        expected[request.id] = alone(number, words, most)
    engine.observer = Observer()
    engine.observer.stepped = lambda report: rows.append(
        (report.rows, runner.steps[-1] if runner.steps else 0)
    )
    assert drained(engine) == expected
    assert all(runner.bucket(fed) == runner.bucket(run) for run, fed in rows if run)


def test_a_request_that_is_cancelled_last_is_reported_gone():
    engine, seen = fake_engine(), []
    engine.observer.stepped = seen.append
    engine.submit(request := engine.request(image(1), ignore_eos=True))
    engine.step()
    assert seen[-1].running == 1
    engine.cancel(request.id)
    assert (seen[-1].running, seen[-1].rows) == (0, 0)


def test_all_rows_of_a_request_are_reported():
    engine, rows = fake_engine(EngineConfig(slots=8)), []
    engine.observer.stepped = lambda report: rows.append(report.rows)
    engine.submit(engine.request(image(1), num_beams=3, max_new_tokens=4))
    engine.submit(engine.request(image(2), max_new_tokens=4, ignore_eos=True))
    drained(engine)
    assert max(rows) == 4


class Overlapping(Buckets):
    """Notes the order of the calls, and results only once they are waited for."""

    overlaps = True

    def __init__(self):
        super().__init__(burst=4)
        self.calls = []

    def encode(self, pixels, slots):
        self.calls.append("encode")
        super().encode(pixels, slots)

    def wait_encoded(self):
        self.calls.append("encoded")

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        self.calls.append("decode")
        found = super().decode(tokens, fed, forced, candidates)

        def wait():
            self.calls.append("results")
            return found

        return SimpleNamespace(wait=wait)

    def proceed(self, steps):
        pending = super().proceed(steps)
        self.calls[-1] = "proceed"
        return pending

    def move(self, source, target):
        self.calls.append("move")
        super().move(source, target)


def test_bursts_that_follow_one_another_end_where_a_cache_does():
    """That of the oldest, which goes on while it ends; the others need several more."""
    engine = fake_engine(EngineConfig(slots=8, encode_batch=1, patience=0))
    runner = engine.runner = Overlapping()
    most = runner.text_tokens
    for number, tokens in enumerate([most, most - 1, most - 2, most - 3, 20, 20, 20, 20]):
        engine.submit(engine.request(image(number), max_new_tokens=tokens, ignore_eos=True))
    lengths = sorted(map(len, drained(engine).values()))
    assert lengths == [20] * 4 + [most - n for n in (3, 2, 1, 0)]


def test_a_burst_follows_the_last_before_the_host_has_the_results_of_that():
    engine = fake_engine(EngineConfig(slots=8, encode_batch=4, patience=0))
    runner = engine.runner = Overlapping()
    requests = [
        engine.request(image(number), max_new_tokens=most, ignore_eos=True)
        for number, most in enumerate([12, 12, 12, 13])
    ]
    for request in requests:
        engine.submit(request)
    texts = drained(engine)
    assert [len(texts[request.id]) for request in requests] == [12, 12, 12, 13]
    order = " ".join(runner.calls)
    assert order == "encode decode encoded" + 3 * " proceed results" + " results"


def test_the_next_images_are_encoded_while_the_host_works_on_a_burst():
    said = []
    for kind in (FakeRunner, Overlapping):
        engine = fake_engine(EngineConfig(slots=8, encode_batch=4, patience=0))
        runner = engine.runner = kind()
        requests = [
            engine.request(image(number % 10), max_new_tokens=3 + number % 7, ignore_eos=True)
            for number in range(24)
        ]
        for request in requests:
            engine.submit(request)
        texts = drained(engine)
        said.append([texts[request.id] for request in requests])
    assert said[0] == said[1]
    order = " ".join(runner.calls)
    assert order.startswith("encode decode encoded encode results decode encoded encode results")


@pytest.mark.parametrize(("waiting", "moves"), [({}, False), ({"n": 8, "temperature": 1.0}, True)])
def test_holes_are_left_to_those_who_wait_if_they_can_fill_them(waiting, moves):
    engine = fake_engine(EngineConfig(slots=8, encode_batch=4, patience=0))
    runner = engine.runner = Overlapping()
    for number, most in enumerate([2] * 5 + [20] * 3):  # the last have the highest slots
        engine.submit(engine.request(image(number), max_new_tokens=most, ignore_eos=True))
    for number in range(1 if waiting else 4):
        engine.submit(engine.request(image(number), max_new_tokens=4, **waiting))
    while engine.scheduler.waiting:
        engine.step()
    assert ("move" in runner.calls) is moves
    drained(engine)


class OnADevice(FakeRunner):
    """Encoder calls of 10 seconds and steps of 3, one after the other, beside the host."""

    overlaps = True

    def __init__(self):
        super().__init__(burst=4, slots=8)
        self.now = self.free = self.encoded_at = 0.0

    def _queue(self, seconds):
        self.free = max(self.free, self.now) + seconds
        return self.free

    def _wait(self, moment):
        self.now = max(self.now, moment)

    def encode(self, pixels, slots):
        super().encode(pixels, slots)
        self.encoded_at = self._queue(10)

    def wait_encoded(self):
        self._wait(self.encoded_at)

    def decode(self, tokens, fed, forced=(), candidates=1, searches=()):
        found, end = super().decode(tokens, fed, forced, candidates), self._queue(3)
        if candidates > 1:
            self._wait(end)
        return SimpleNamespace(wait=lambda: self._wait(end) or found)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 1}])
def test_each_call_on_a_device_is_booked_with_its_own_time(sampling):
    runner, times = OnADevice(), {"encoded": [], "decoded": []}
    engine = Engine(MANIFEST, FakeTokenizer(), runner, EngineConfig(), clock=lambda: runner.now)
    for kind, seconds in times.items():
        setattr(engine._pacing, kind, seconds.append)
    engine._pacing.may_encode = lambda waiting, running: True
    for number in range(24):
        request = engine.request(image(number % 10), max_new_tokens=8, ignore_eos=True, **sampling)
        engine.submit(request)
    ended = []
    while not engine.idle:
        ended += engine.step()
        runner.now += 2  # the host's
    assert {*times["encoded"]} == {10}
    assert {*times["decoded"]} == {3}
    assert len(times["encoded"]) == 6
    assert ended[0].timing.encode_s == 10


def test_a_sequence_is_not_moved_where_that_saves_nothing():
    moves = {}
    for kind in (FakeRunner, Buckets):
        engine = fake_engine(EngineConfig(slots=8, patience=0))
        engine.runner = kind()
        for number in range(40):
            engine.submit(
                engine.request(image(number % 10), max_new_tokens=3 + number % 7, ignore_eos=True)
            )
        drained(engine)
        moves[kind] = engine.runner.moves
    assert moves[Buckets] < moves[FakeRunner] / 2


@settings(deadline=None, max_examples=60)
@given(REQUESTS, CONFIGS, st.data())
def test_cancelling_some_changes_nothing_for_the_others(requests, config, data):
    engine = fake_engine(config)
    asked = {
        engine.request(image(n), prompt(w), max_new_tokens=m).id: (n, w, m)
        for n, w, m, _ in requests
    }
    for number, (n, words, most) in asked.items():
        engine.submit(replace(ask(engine, n, words, most), id=number))
    gone = data.draw(st.sets(st.sampled_from(list(asked))))
    victims, finished, cancelled = list(gone), [], set()
    while not engine.idle:
        finished += engine.step()
        if victims and engine.cancel(victim := victims.pop()):
            cancelled.add(victim)
    for output in finished:
        assert output.token_ids == alone(*asked[output.id])
    assert {output.id for output in finished} == asked.keys() - cancelled


def test_generate_keeps_the_order_and_counts_tokens():
    captions = fake_engine().generate([image(n) for n in range(10)], max_new_tokens=6)
    assert [c.token_ids for c in captions] == [alone(n, [], 6) for n in range(10)]
    for caption in captions:
        stopped = caption.finish_reason is FinishReason.STOP
        assert caption.completion_tokens == len(caption.token_ids) - stopped
        assert (caption.token_ids[-1] == EOS) == stopped
        timing = caption.timing
        assert min(timing.queue_s, timing.encode_s, timing.decode_s) >= 0


def test_continuous_batching_takes_fewer_steps_than_static():
    def steps(refill: bool) -> int:
        engine = fake_engine(EngineConfig(slots=4, encode_batch=4, refill=refill))
        for number in range(40):
            engine.submit(ask(engine, number, [], 1 + number * 5 % 12, ignore_eos=True))
        drained(engine)
        return len(engine.runner.steps)

    assert steps(refill=True) < 0.75 * steps(refill=False)


def test_ignore_eos_generates_to_the_limit():
    [caption] = fake_engine().generate([image(1)], max_new_tokens=30, ignore_eos=True)
    assert len(caption.token_ids) == 30
    assert caption.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("pixels", "words", "most", "message"),
    [
        (np.zeros((3, 5, 4), np.uint8), "", 4, r"\[3, 5, 4\] is no image"),
        (np.zeros((3, 4, 4), np.float32), "", 4, "pass uint8"),
        (image(0), "", 0, "max_new_tokens is 0: with this prompt use 1 to 32"),
        (image(0), "3 4 5", 30, "use 1 to 29"),
        (image(0), " ".join(["3"] * 40), None, "40 tokens: shorten it to 31"),
    ],
)
def test_what_never_fits_is_refused_with_the_limit(pixels, words, most, message):
    engine = fake_engine()
    with pytest.raises((InvalidRequest, InvalidImage), match=message):
        engine.request(pixels, words, max_new_tokens=most)
    assert engine.scheduler.idle


@pytest.mark.parametrize("wrong", [
    {"prompt_ids": ()}, {"prompt_ids": (101, 10**6)}, {"prompt_ids": (-1,)},
    {"pixels": np.zeros((3, 5, 5), np.uint8)}, {"pixels": np.zeros((3, 4, 4), np.float32)},
    {"sampling": SamplingParams(0)}, {"sampling": SamplingParams(100)},
])  # fmt: skip
def test_a_request_made_by_hand_is_checked_and_disturbs_no_other(wrong):
    engine = fake_engine()
    other = engine.request(image(1))
    engine.submit(other)
    with pytest.raises(InvalidRequest):
        engine.submit(replace(engine.request(image(0)), **wrong))
    assert drained(engine)[other.id] == alone(1, [], 20)


def test_a_request_runs_once_at_a_time():
    engine = fake_engine()
    request = engine.request(image(1))
    engine.submit(request)
    with pytest.raises(InvalidRequest, match="runs already"):
        engine.submit(request)
    first = drained(engine)[request.id]
    engine.submit(request)
    assert drained(engine)[request.id] == first


def test_the_longest_prompt_and_the_longest_caption_fit():
    engine = fake_engine()
    captions = engine.generate([image(0), image(1)], [prompt([3] * 31), None])
    assert len(captions[0].token_ids) == 1
    [longest] = engine.generate([image(2)], max_new_tokens=32, ignore_eos=True)
    assert len(longest.token_ids) == 32


def test_a_stream_tells_each_token_once_and_its_end():
    engine = fake_engine(EngineConfig(slots=2, patience=0), burst=2)
    request = replace(
        engine.request(image(1), "3 4", max_new_tokens=7, ignore_eos=True), stream=True
    )
    engine.submit(request)
    outputs = []
    while not engine.idle:
        outputs += engine.step()
    assert len(outputs) > 2
    assert {output.finish_reason for output in outputs[:-1]} == {None}
    assert outputs[-1].finish_reason is FinishReason.LENGTH and outputs[-1].timing is not None
    [whole] = fake_engine().generate([image(1)], ["3 4"], max_new_tokens=7, ignore_eos=True)
    assert engine.caption(request, *outputs).token_ids == whole.token_ids


@pytest.mark.parametrize("good", [1, 40])
def test_generate_leaves_nothing_behind_when_one_image_is_bad(good):
    engine = fake_engine()
    with pytest.raises(InvalidImage, match=f"image {good + 1}"):
        engine.generate([*[image(1)] * good, np.zeros(3, np.uint8)])
    engine.generate([image(1)])  # after the cancellations
    assert engine.scheduler.idle


def test_generate_takes_a_prompt_for_each_image():
    for prompts in (["3", "4"], []):
        with pytest.raises(InvalidRequest, match=f"1 images and {len(prompts)} prompts"):
            fake_engine().generate([image(1)], prompts)


def test_a_request_may_be_run_again_but_not_beside_itself():
    engine = fake_engine(EngineConfig(slots=1, encode_batch=1))
    request, others = ask(engine, 1, [], 6), [ask(engine, n, [], 6) for n in range(5)]
    with pytest.raises(InvalidRequest, match="twice"):
        engine.run([request, request])
    captions = engine.run([request, *others, request])
    assert [c.token_ids for c in captions] == [alone(n, [], 6) for n in (1, *range(5), 1)]


def test_requests_are_made_as_slots_become_free():
    engine, alive, most = fake_engine(EngineConfig(slots=4)), list[weakref.ref](), 0

    def requests() -> Iterator[GenerationRequest]:
        nonlocal most
        for number in range(60):
            request = ask(engine, number % 10, [3] * (number % 3), 6, stream=number % 2 == 0)
            alive.append(weakref.ref(request.pixels))
            most = max(most, sum(each() is not None for each in alive))
            yield request

    captions = engine.run(requests())
    assert [c.token_ids for c in captions] == [alone(n % 10, [3] * (n % 3), 6) for n in range(60)]
    assert most <= 5 * engine.slots
