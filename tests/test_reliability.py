"""What the service promises, tried on a running one: the short forms of `make chaos`."""

import pytest

from bench.reliability.scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_is_as_promised(name):
    verdict = SCENARIOS[name][1](False)
    assert verdict.passed, verdict.figure
