"""What an engine's calls cost: by themselves, or while it serves."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.timing import pictures, seconds
from bench.load.arrivals import closed_loop, coco_jobs
from runtime.engine import Engine
from runtime.execution.base import Candidates, leading

# Clients of the loops that show what calls take in use, and captions of each.
_IN_USE = {1: 16, 4: 32, 16: 64, 64: 128}


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of an encoder call by its images, of a decode step by its rows (from one)."""

    encode_s: list[float]
    decode_s: list[float]

    @classmethod
    def median(cls, several: Iterable["Costs"]) -> "Costs":
        """The median of each call, over measurements of the same engine."""

        def usual(lists: Iterable[list[float]]) -> list[float]:
            return [statistics.median(each) for each in zip(*lists, strict=True)]

        found = list(several)
        return cls(usual(c.encode_s for c in found), usual(c.decode_s for c in found))


def measure_alone(folder: Path, turns: int) -> tuple[Costs, str]:
    """Costs of an engine as it would be served: encoder calls up to its batch, steps of every size.

    The fastest of each counts: what others take of the machine is no call's cost.

    Returns what runs where, too.
    """
    engine = Engine.open(folder)
    runner, images = engine.runner, engine.encode_batch
    pixels = pictures(images, engine.manifest.sizes.pixels)
    age = runner.text_tokens // 4
    encodes = [partial(runner.encode, pixels[:n], leading(n)) for n in range(1, images + 1)]
    decodes = [partial(runner.decode, [0] * n, [age] * n) for n in range(1, engine.slots + 1)]
    # In turns, so that a slow moment of the machine is no call's own.
    taken = [[seconds(call) for call in encodes + decodes] for _ in range(turns)]
    fastest = [min(times) for times in zip(*taken, strict=True)]
    return Costs(fastest[:images], fastest[images:]), engine.runs_on


def measure_in_use(folder: Path) -> tuple[Costs, str]:
    """The same while the engine serves captions as long as COCO's to few clients and to many.

    Calls take longer than by themselves, where they find the caches warm; and the engine's own
    loop, which is between them, is counted to the call that it led to. Sizes that never came up lie
    between those that did.
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
    """A runner whose calls are timed by their images or rows, each from the end of the last."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.last = time.perf_counter()
        self.encodes: dict[int, list[float]] = defaultdict(list)
        self.decodes: dict[int, list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def encode(self, pixels: Sequence[np.ndarray], *rest: Any) -> None:
        self._runner.encode(pixels, *rest)
        self._note(self.encodes[len(pixels)])

    def decode(self, tokens: Sequence[int], *rest: Any) -> Candidates:
        found: Candidates = self._runner.decode(tokens, *rest)
        self._note(self.decodes[len(tokens)])
        return found

    def _note(self, times: list[float]) -> None:
        now = time.perf_counter()
        times.append(now - self.last)
        self.last = now
