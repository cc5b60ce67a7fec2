"""The engine's loop on a clock of its own."""

import pytest

from bench.load import arrivals
from bench.load.costs import Costs
from bench.load.replay import replayed
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig
from tests.support.paths import ROOT

DEMO = ROOT / "engines" / "demo"


def engine(costs, **config):
    return replayed(DEMO, manifests.load(DEMO), costs, EngineConfig(**config))


def jobs(count, tokens):
    from bench.common.timing import pictures

    shape = manifests.load(DEMO).sizes.pixels
    return arrivals.jobs(pictures(1, shape), count, tokens, tokens)


def test_time_is_the_sum_of_what_the_calls_cost():
    made, clock = engine(Costs([0.5], [0.01, 0.02]), patience=0)
    waits = arrivals.closed_loop(made, jobs(3, tokens=4), clients=1)
    assert waits == pytest.approx([0.54] * 3)
    assert clock.now == pytest.approx(3 * 0.54)


def test_arrivals_wait_for_their_time_and_for_each_other():
    made, clock = engine(Costs([0.5], [0.01, 0.02]), patience=0)
    waits = arrivals.poisson(made, jobs(20, tokens=2), 0.1, clock, clock.pass_by)
    assert len(waits) == 20
    assert min(waits) == pytest.approx(0.52), "one that was alone"
    assert clock.now > 20 / 0.1 / 3


def test_the_policy_is_the_engines_own():
    """Patience lets those that run go first: two jobs at once, the second is encoded later."""
    costs = Costs([0.5], [0.01, 0.02])
    ends = {}
    for patience in (0, 0.2):
        made, _ = engine(costs, patience=patience)
        ends[patience] = min(arrivals.closed_loop(made, jobs(2, tokens=8), clients=2))
    assert ends[0.2] == pytest.approx(0.5 + 8 * 0.01)
    assert ends[0] > 1.0
