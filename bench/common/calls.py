"""Calls of a runner, each to its end."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.execution.base import Candidates, ModelRunner, leading


def encode(runner: ModelRunner, pixels: Sequence[np.ndarray], times: int = 1) -> None:
    """Encode images into the lowest slots, `times` in a row."""
    for _ in range(times):
        runner.encode(pixels, leading(len(pixels)))
    runner.wait_encoded()


def decode(runner: ModelRunner, *args: Any) -> Candidates:
    """Decode steps; see `ModelRunner.decode`."""
    return runner.decode(*args).wait()
