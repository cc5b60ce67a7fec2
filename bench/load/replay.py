"""An engine without graphs on a simulated clock: its calls take as long as measured ones did.

The engine's loop, scheduler and pacing are the real ones. Comparisons that would take an hour take
seconds, undisturbed by other work on the machine, and are deterministic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.load.costs import Costs
from runtime.engine import Engine
from runtime.execution.base import Candidates, Search
from runtime.model.manifest import Manifest
from runtime.model.tokenizer import CaptionTokenizer
from runtime.planning.config import EngineConfig
from runtime.planning.plan import Plan


@dataclass(slots=True)
class Clock:
    """A clock in seconds that stands still until it is advanced."""

    now: float = 0.0

    def __call__(self) -> float:
        """Stand in for `time.perf_counter`."""
        return self.now

    def pass_by(self, seconds: float) -> None:
        """Stand in for `time.sleep`; returns at once."""
        self.now += seconds


@dataclass(slots=True)
class _Runner:
    costs: Costs
    clock: Clock
    text_tokens: int
    plan: Plan
    burst: int = 1
    graphs: bool = False
    on_gpu: bool = False
    overlaps: bool = False
    searches: bool = False
    move_cost: int = 1
    runs_on: str = "replay"

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        self.clock.pass_by(self.costs.encode_s[len(pixels) - 1])

    def wait_encoded(self) -> None:
        """`encode` has passed the time."""

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
        searches: Sequence[Search] = (),
    ) -> Candidates:
        self.clock.pass_by(self.costs.decode_s[len(tokens) - 1])
        shape = (1, len(tokens), 1)
        return Candidates(np.zeros(shape, np.int64), np.zeros(shape, np.float32))

    def proceed(self, steps: int) -> Candidates:
        """Not for a runner that does not overlap."""
        raise NotImplementedError

    def bucket(self, rows: int) -> int:
        """Steps are not padded: as many rows as there are."""
        return rows

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """Takes no time: the real one is negligible."""

    def move(self, source: int, target: int) -> None:
        """Takes no time: the real one is negligible."""


def replayed(
    folder: Path, manifest: Manifest, costs: Costs, config: EngineConfig
) -> tuple[Engine, Clock]:
    """An engine that replays `costs`, and its clock. Jobs must ignore the end token.

    config: without slots or encode_batch, as many as `costs` has.
    """
    clock = Clock()
    batch = config.encode_batch or len(costs.encode_s)
    slots = config.slots or len(costs.decode_s)
    plan = Plan("replay", "replay", encode_batch=batch, slots=slots)
    runner = _Runner(costs, clock, manifest.sizes.text, plan)
    return Engine(manifest, CaptionTokenizer(folder, manifest), runner, config, clock), clock
