"""Running sequences get their turn before the next image is encoded."""

from runtime.pacing import Pacing


def turns(waiting: int, running: int, patience: float, encode_s: float, step_s: float) -> int:
    """Decode steps between two encoder calls."""
    pacing = Pacing(patience)
    pacing.encoded(encode_s)
    steps = 0
    while not pacing.may_encode(waiting, running):
        pacing.decoded(step_s)
        steps += 1
    return steps


def test_few_that_wait_let_the_running_ones_finish_first():
    assert turns(waiting=1, running=5, patience=0.1, encode_s=0.050, step_s=0.002) == 13
    assert turns(waiting=5, running=5, patience=0.1, encode_s=0.050, step_s=0.002) == 3
    assert turns(waiting=50, running=5, patience=0.1, encode_s=0.050, step_s=0.002) == 1


def test_few_that_run_do_not_keep_many_waiting():
    assert turns(waiting=1, running=1, patience=0.1, encode_s=0.050, step_s=0.002) == 3


def test_the_turn_follows_what_the_graphs_cost():
    assert turns(waiting=1, running=5, patience=0.1, encode_s=0.002, step_s=0.002) == 1
    assert turns(waiting=1, running=5, patience=0.4, encode_s=0.002, step_s=0.002) == 2


def test_without_patience_images_go_first():
    assert turns(waiting=1, running=5, patience=0, encode_s=1.0, step_s=0.001) == 0


def test_the_first_image_never_waits():
    assert Pacing(9).may_encode(1, 3)
