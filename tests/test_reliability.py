"""What the service promises, tried on a running one: the short forms of `make chaos`."""

import pytest

from bench.reliability.scenarios import SCENARIOS


# The siege is those before it, all at once and for long.
@pytest.mark.parametrize("name", [n for n in SCENARIOS if n != "all attacks for two hours"])
def test_it_is_as_promised(name):
    verdict = SCENARIOS[name][1](False)
    assert verdict.passed, verdict.figure
