"""Test images, the same for all contestants, and timers."""

import statistics
import time
from collections.abc import Callable

import numpy as np


def pictures(count: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    """`count` different uint8 images of `shape`; the same at every call."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(count):
        blocks = rng.integers(0, 256, (*shape[:-2], 7, 7), np.uint8)
        scale = (shape[-2] // 7, shape[-1] // 7)
        grown = np.kron(blocks, np.ones((1,) * (len(shape) - 2) + scale, np.uint8))
        padding = [(0, whole - part) for whole, part in zip(shape, grown.shape, strict=True)]
        found.append(np.pad(grown, padding, mode="edge"))
    return found


def median_s(action: Callable[[], object], repeats: int) -> float:
    """Median time of an action in seconds, after one untimed run."""
    action()
    return statistics.median(seconds(action) for _ in range(repeats))


def seconds(action: Callable[[], object]) -> float:
    """Wall-clock seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
