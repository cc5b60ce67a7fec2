"""The benchmark's own arithmetic, in one place so that it can be tested."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile: the smallest value with at least `share` (0 to 1) at or below it."""
    if not values or not 0 < share <= 1:
        raise ValueError("a percentile takes values, and a share above 0 and up to 1")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def rate(done: int, seconds: float) -> float:
    """Throughput per second; 0 if nothing was done."""
    return done / seconds if done else 0.0


def against(rates: Mapping[str, Sequence[float]], own: str) -> dict[str, Any]:
    """Median of each one's rates, and of their shares of `own`'s in the same turn."""
    shares = {
        name: statistics.median(r / ours for r, ours in zip(found, rates[own], strict=True))
        for name, found in rates.items()
    }
    return {"rates": {n: statistics.median(found) for n, found in rates.items()}, "shares": shares}


def affordable(requests: int, clients: int, solo: float, budget: float) -> int:
    """Number of requests for a contestant whose single request takes `solo` seconds.

    As many rounds of one request per client as fit `budget` seconds, at most `requests`; a single
    round may take twice the budget. 0 if not even that fits.
    """
    rounds = int(budget / (solo * clients))
    if rounds == 0:
        return clients if solo * clients <= 2 * budget else 0
    return min(requests, rounds * clients)


def knee(points: Sequence[tuple[int, float]], gain: float = 0.1) -> int:
    """The batch size beyond which a larger one saves less than `gain` of the time per image.

    points: (batch size, time per image), by batch size.
    """
    best_batch, best_time = points[0]
    for batch, time in points[1:]:
        if time < best_time * (1 - gain):
            best_batch, best_time = batch, time
    return best_batch


def highest(low: float, high: float, holds: list[tuple[float, bool]]) -> float | None:
    """The next rate to try between `low` and `high`, or None once they are within 5 %.

    holds: rates that were tried, and whether they held.
    """
    for tried, held in holds:
        if held:
            low = max(low, tried)
        else:
            high = min(high, tried)
    return None if high <= low * 1.05 else (low + high) / 2
