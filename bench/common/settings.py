"""How much to measure."""

from dataclasses import dataclass
from pathlib import Path

ENGINE = Path("engines/random-git-base")
SHAPE = "git-base"  # of both sides; their weights are the same random ones
TOKENS = 16  # new tokens of every caption, forced


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds.

    clients, requests: of ApacheBench; more clients than requests are left out.
    budget: time for one ApacheBench run, which decides how many requests a slow contestant gets.
    batches: images at once, for the curves of time against batch size.
    repeats: timed runs behind each median.
    images: that Vignette captions in one throughput run.
    hold: how long an open-loop rate has to hold, in terms of the bound: too short a test lets more
        through than can be served for long.
    rates: open-loop rates to try for each bound; with one, Vignette's only.
    replayed: captions in each replay of a scheduling policy.
    ablation_batch: images at once in the ablation's static steps.
    scenes: of the demo model's held-out ones, of each kind.
    least_queries: fewest queries of an open-loop test.
    most_hosts: of a simulated cluster.
    """

    engine: Path = ENGINE
    clients: tuple[int, ...] = (1, 8, 16, 64)
    requests: tuple[int, ...] = (32, 256)
    budget: int = 16
    precisions: tuple[str, ...] = ("fp32", "bf16")
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    torch_batches: tuple[int, ...] = (1, 4, 8)
    repeats: int = 3
    images: int = 64
    hold: int = 6
    rates: int = 3
    replayed: int = 1000
    ablation_batch: int = 8
    scenes: int = 1000
    least_queries: int = 20
    most_hosts: int = 256


QUICK = Settings(
    clients=(8,),
    requests=(16,),
    budget=4,
    precisions=("bf16",),
    batches=(1, 4, 16),
    torch_batches=(1, 2),
    repeats=1,
    images=12,
    hold=3,
    rates=1,
    replayed=200,
    ablation_batch=1,
    scenes=100,
    least_queries=6,
    most_hosts=4,
)
