"""The scheduler alone: slots, order, compaction, static batching, cancelling."""

import subprocess
import sys

import pytest

from runtime.decoding.continuation import Continuation
from runtime.request import FinishReason, GenerationRequest, SamplingParams
from runtime.scheduler import Scheduler
from runtime.sequence import Sequence


def added(scheduler: Scheduler, rows: int = 1) -> Sequence:
    asked = SamplingParams(4, num_beams=rows)
    request = GenerationRequest(None, (0,), asked)
    return scheduler.add(request, Continuation((0,), asked, eos=1))


def finish(*sequences) -> None:
    for sequence in sequences:
        sequence.finish_reason = FinishReason.STOP


def test_knows_nothing_of_tensors():
    code = (
        "import sys, runtime.scheduler;"
        "print([m for m in sys.modules if m.split('.')[0] in ('numpy', 'onnxruntime', 'PIL')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_first_come_first_served_into_the_lowest_slots():
    scheduler = Scheduler(slots=2, encode_batch=8)
    sequences = [added(scheduler) for _ in range(3)]
    assert scheduler.admit() == sequences[:2]
    assert [s.slots for s in sequences] == [[0], [1], []]
    assert (scheduler.waiting, scheduler.running) == (1, sequences[:2])


def test_at_most_encode_batch_between_two_steps():
    scheduler = Scheduler(slots=8, encode_batch=2)
    for _ in range(5):
        added(scheduler)
    assert [len(scheduler.admit()) for _ in range(4)] == [2, 2, 1, 0]


def test_full_slots_are_refilled_by_a_call_that_is_worth_it():
    scheduler = Scheduler(slots=16, encode_batch=16)
    first = [added(scheduler) for _ in range(16)]
    assert scheduler.admit() == first
    late = [added(scheduler) for _ in range(5)]
    for ended in range(3):  # worth it: a quarter of the slots, or all that wait
        finish(first[ended])
        scheduler.release_finished()
        assert scheduler.admit() == []
    finish(first[3])
    scheduler.release_finished()
    assert scheduler.admit() == late[:4]
    finish(first[4])
    scheduler.release_finished()
    assert scheduler.admit() == late[4:]


def test_nobody_waits_for_slots_when_nothing_runs():
    scheduler = Scheduler(slots=16, encode_batch=4)
    late = [added(scheduler) for _ in range(2)]
    assert scheduler.admit() == late


def test_a_freed_slot_is_filled_before_anything_moves():
    scheduler = Scheduler(slots=3, encode_batch=3)
    first, _, _ = [added(scheduler) for _ in range(3)]
    scheduler.admit()
    late = added(scheduler)
    finish(first)
    assert scheduler.release_finished() == [first]
    assert scheduler.admit() == [late]
    assert late.slots == [0]
    assert scheduler.compact(int) == []


def test_holes_are_closed_from_the_top():
    scheduler = Scheduler(slots=4, encode_batch=4)
    a, b, c, d = [added(scheduler) for _ in range(4)]
    scheduler.admit()
    finish(a, c)
    scheduler.release_finished()
    assert scheduler.compact(int) == [(3, 0)]
    assert (d.slots, b.slots) == ([0], [1])
    assert scheduler.running == [d, b]


@pytest.mark.parametrize(
    ("left", "cost", "moved"),
    [
        ({0, 1, 7}, 1, [(7, 2)]),  # a step of 4 rows in place of 8
        ({0, 1, 7}, 4, [(7, 2)]),
        ({0, 1, 7}, 5, []),
        ({6, 7}, 3, [(7, 0), (6, 1)]),  # 2 in place of 8
        ({6, 7}, 4, []),
        ({2, 3, 7}, 4, [(7, 0)]),  # the others would save nothing more
        ({1, 3, 5, 6, 7}, 1, []),  # 8 rows whatever is moved
    ],
)
def test_slots_are_moved_if_that_makes_steps_enough_smaller(left, cost, moved):
    scheduler = Scheduler(slots=8, encode_batch=8)
    sequences = [added(scheduler) for _ in range(8)]
    scheduler.admit()
    for slot in {*range(8)} - left:
        scheduler.cancel(sequences[slot])
    assert scheduler.compact(lambda rows: 1 << (rows - 1).bit_length(), cost) == moved
    after = {slot for sequence in scheduler.running for slot in sequence.slots}
    assert after == (left - {a for a, _ in moved}) | {b for _, b in moved}
    next_one = added(scheduler)
    assert scheduler.admit() == [next_one]
    assert next_one.slots == [min({*range(8)} - after)]  # the lowest that is free


def test_without_refill_a_batch_ends_before_the_next_begins():
    scheduler = Scheduler(slots=2, encode_batch=1, refill=False)
    a, b, c = [added(scheduler) for _ in range(3)]
    assert scheduler.admit() == [a, b]  # a whole batch, larger than `encode_batch`
    finish(a)
    scheduler.release_finished()
    assert scheduler.admit() == []
    finish(b)
    scheduler.release_finished()
    assert scheduler.admit() == [c]


def test_cancelling_frees_the_slot_at_once_and_only_once():
    scheduler = Scheduler(slots=1, encode_batch=1)
    running, waiting, late = [added(scheduler) for _ in range(3)]
    scheduler.admit()
    assert scheduler.cancel(waiting)
    assert scheduler.cancel(running)
    assert not scheduler.cancel(running)
    assert scheduler.admit() == [late]
    assert scheduler.cancel(late)
    assert scheduler.idle
