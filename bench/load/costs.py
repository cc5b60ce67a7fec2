"""Times of an engine's encoder calls and decode steps, alone or while it serves."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import calls
from bench.common.timing import pictures, seconds
from bench.load.arrivals import closed_loop, coco_jobs
from runtime.engine import Engine
from runtime.execution.base import Candidates

# Closed loops that time calls in use: clients -> captions.
_IN_USE = {1: 16, 4: 32, 16: 64, 64: 128}


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of an encoder call by images, of a decode step by rows; index 0 is one of them."""

    encode_s: list[float]
    decode_s: list[float]

    @classmethod
    def median(cls, several: Iterable["Costs"]) -> "Costs":
        """Element-wise median over measurements of the same engine."""

        def usual(lists: Iterable[list[float]]) -> list[float]:
            return [statistics.median(each) for each in zip(*lists, strict=True)]

        found = list(several)
        return cls(usual(c.encode_s for c in found), usual(c.decode_s for c in found))


def measure_alone(folder: Path, turns: int) -> tuple[Costs, str]:
    """Minimum time of each call of an engine as served, and what runs where.

    Encoder calls of up to `encode_batch` images, decode steps of 1 to `slots` rows. The minimum of
    all turns excludes what other processes take of the machine.
    """
    engine = Engine.open(folder)
    runner, images = engine.runner, engine.encode_batch
    pixels = pictures(images, engine.manifest.sizes.pixels)
    age = runner.text_tokens // 4
    encodes = [partial(calls.encode, runner, pixels[:n]) for n in range(1, images + 1)]
    rows = range(1, engine.slots + 1)
    decodes = [partial(calls.decode, runner, [0] * n, [age] * n) for n in rows]
    # In turns, so that a slow moment of the machine does not hit one call alone.
    taken = [[seconds(call) for call in encodes + decodes] for _ in range(turns)]
    fastest = [min(times) for times in zip(*taken, strict=True)]
    return Costs(fastest[:images], fastest[images:]), engine.runs_on


def measure_in_use(folder: Path) -> tuple[Costs, str]:
    """Mean time of each call while the engine serves captions as long as COCO's, to few clients and
    to many; and what runs where.

    Calls take longer in use than alone, where CPU caches are warm; time in the engine's own loop is
    added to the call that follows it. Sizes that never occurred are interpolated.
    """
    engine = Engine.open(folder)
    work = coco_jobs(pictures(16, engine.manifest.sizes.pixels), max(_IN_USE.values()))
    closed_loop(engine, work[:16], 16)
    runner = engine.runner = _Timed(engine.runner)
    for clients, captions in _IN_USE.items():
        runner.last = time.perf_counter()
        closed_loop(engine, work[:captions], clients)
    encode_s = _by_size(runner.encodes, engine.encode_batch)
    return Costs(encode_s, _by_size(runner.decodes, engine.slots)), engine.runs_on


def _by_size(taken: dict[int, list[float]], most: int) -> list[float]:
    seen = sorted(taken)
    means = [statistics.fmean(taken[size]) for size in seen]
    return [float(s) for s in np.interp(range(1, most + 1), seen, means)]


class _Timed:
    """A runner that times its calls, by images or rows, each from the end of the previous one."""

    def __init__(self, runner: Any) -> None:
        self._runner, self.overlaps = runner, False
        self.last = time.perf_counter()
        self.encodes: dict[int, list[float]] = defaultdict(list)
        self.decodes: dict[int, list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def encode(self, pixels: Sequence[np.ndarray], *rest: Any) -> None:
        self._runner.encode(pixels, *rest)
        self._runner.wait_encoded()
        self._note(self.encodes[len(pixels)])

    def decode(self, tokens: Sequence[int], *rest: Any) -> Candidates:
        found: Candidates = self._runner.decode(tokens, *rest).wait()
        self._note(self.decodes[len(tokens)])
        return found

    def _note(self, times: list[float]) -> None:
        now = time.perf_counter()
        times.append(now - self.last)
        self.last = now
