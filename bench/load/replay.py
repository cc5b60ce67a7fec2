"""An engine without graphs, on a clock of its own: its calls take as long as the real ones took.

The engine's loop, scheduler and pacing are the real ones. What other work on the machine would
blur, and what would take an hour, is compared in seconds, and comes out the same each time.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.timing import pictures, seconds
from bench.load.arrivals import Job, closed_loop
from runtime.engine import Engine
from runtime.execution.base import Candidates, leading
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.planning.config import EngineConfig

_IN_USE, _CLIENTS = 64, 16  # images and clients of the loop that shows what calls take in use


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of an encoder call by its images, of a decode step by its rows (from one)."""

    encode_s: list[float]
    decode_s: list[float]


def measure_costs(
    folder: Path, turns: int, of: Callable[[Sequence[float]], float] = min
) -> tuple[Costs, str]:
    """Of an engine as it would be served: encoder calls up to its batch, steps of every size.

    of: which of the times of a call counts; the fastest, because what others take of the machine is
        no call's cost, unless that is to be in it.

    Returns what runs where, too.
    """
    engine = Engine.open(folder)
    runner, slots, images = engine.runner, engine.config.slots, engine.config.encode_batch
    assert slots is not None
    assert images is not None
    pixels = pictures(images, runner.pixels_shape)
    age = runner.text_tokens // 4
    encodes = [partial(runner.encode, pixels[:n], leading(n)) for n in range(1, images + 1)]
    decodes = [partial(runner.decode, [0] * n, [age] * n) for n in range(1, slots + 1)]
    # In turns, so that a slow moment of the machine is no call's own.
    taken = [[seconds(call) for call in encodes + decodes] for _ in range(turns)]
    usual = [of(times) for times in zip(*taken, strict=True)]
    encode_s, decode_s = usual[:images], usual[images:]
    return Costs(encode_s, decode_s), engine.runs_on


def measure_in_use(folder: Path, turns: int, tokens: int) -> tuple[Costs, str]:
    """The same, as they take while the engine serves: a call by itself finds the caches warm, and
    between calls there is the engine's loop, which is added to its steps.

    tokens: of each caption of the clients that it serves for this; one alone shows what the
    smallest calls take, and many what the largest do.
    """
    alone, runs_on = measure_costs(folder, turns, statistics.median)
    engine = Engine.open(folder)
    runner = engine.runner = _Timed(engine.runner)
    work = [(image, tokens) for image in pictures(_IN_USE, runner.pixels_shape)]
    closed_loop(engine, work, _CLIENTS)
    small, large = (
        _Use.of(engine, runner, alone, work[: 4 * clients], clients, turns)
        for clients in (1, _CLIENTS)
    )

    def between(first: float, last: float, place: int, places: int) -> float:
        return first + (last - first) * place / max(1, places - 1)

    encode = [
        s * between(small.encode, large.encode, n, len(alone.encode_s))
        for n, s in enumerate(alone.encode_s)
    ]
    rows = len(alone.decode_s)
    decode = [
        s * between(small.decode, large.decode, n, rows) + between(small.loop, large.loop, n, rows)
        for n, s in enumerate(alone.decode_s)
    ]
    return Costs(encode, decode), runs_on


@dataclass(frozen=True, slots=True)
class _Use:
    """encode, decode: times what calls take alone. loop: seconds beside each step."""

    encode: float
    decode: float
    loop: float

    @classmethod
    def of(
        cls,
        engine: Engine,
        runner: "_Timed",
        alone: Costs,
        work: list[Job],
        clients: int,
        turns: int,
    ) -> "_Use":
        """Medians of so many turns, on an engine that serves so many clients."""
        found = []
        for _ in range(turns):
            runner.encodes, runner.decodes = [], []
            took = seconds(lambda: closed_loop(engine, work, clients))
            encoding = sum(s for _, s in runner.encodes)
            decoding = sum(s for _, s in runner.decodes)
            found.append(
                (
                    encoding / sum(alone.encode_s[n - 1] for n, _ in runner.encodes),
                    decoding / sum(alone.decode_s[n - 1] for n, _ in runner.decodes),
                    (took - encoding - decoding) / len(runner.decodes),
                )
            )
        return cls(*(statistics.median(each) for each in zip(*found, strict=True)))


class _Timed:
    """A runner whose calls are timed: images or rows of each, and its seconds."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.encodes: list[tuple[int, float]] = []
        self.decodes: list[tuple[int, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def encode(self, pixels: Sequence[np.ndarray], *rest: Any) -> None:
        self.encodes.append((len(pixels), seconds(lambda: self._runner.encode(pixels, *rest))))

    def decode(self, tokens: Sequence[int], *rest: Any) -> Candidates:
        found: list[Candidates] = []
        took = seconds(lambda: found.append(self._runner.decode(tokens, *rest)))
        self.decodes.append((len(tokens), took))
        return found[0]


@dataclass(slots=True)
class Clock:
    """Time that passes only when somebody says so, in seconds."""

    now: float = 0.0

    def __call__(self) -> float:
        """As `time.perf_counter`."""
        return self.now

    def pass_by(self, seconds: float) -> None:
        """As `time.sleep`, at once."""
        self.now += seconds


@dataclass(slots=True)
class _Runner:
    costs: Costs
    clock: Clock
    pixels_shape: tuple[int, ...]
    text_tokens: int
    burst: int = 1
    graphs: bool = False
    on_gpu: bool = False
    provider: str = "replay"
    precision: str = "replay"
    runs_on: str = "replay"
    _token: int = field(default=0)

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        self.clock.pass_by(self.costs.encode_s[len(pixels) - 1])

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
    ) -> Candidates:
        self.clock.pass_by(self.costs.decode_s[len(tokens) - 1])
        shape = (1, len(tokens), 1)
        return Candidates(np.zeros(shape, np.int64), np.zeros(shape, np.float32))

    def bucket(self, rows: int) -> int:
        """Each row costs."""
        return rows

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """Costs next to nothing."""

    def move(self, source: int, target: int) -> None:
        """Costs next to nothing."""


def replayed(
    folder: Path, manifest: Manifest, costs: Costs, config: EngineConfig
) -> tuple[Engine, Clock]:
    """An engine with the costs of another, and its clock. Jobs must ignore the end token."""
    clock = Clock()
    runner = _Runner(costs, clock, manifest.sizes.pixels, manifest.sizes.text)
    return Engine(manifest, CaptionTokenizer(folder, manifest), runner, config, clock), clock
