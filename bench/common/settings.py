"""How much to measure."""

from dataclasses import dataclass
from pathlib import Path

from runtime.planning.machine import this_machine

ENGINE = Path("engines/random-git-base")
SHAPE = "git-base"  # GIT variant on both sides, with the same random weights
TOKENS = 16  # new tokens of every caption, forced
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
# In which PyTorch is measured, the fastest last: on a processor without instructions for bf16 that
# takes many times as long as fp32.
PRECISIONS = ("fp32", "bf16") if _BF16 & set(this_machine().instructions) else ("fp32",)


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure; times in seconds.

    clients, requests: of ApacheBench; pairs with more clients than requests are left out.
    budget: time for one ApacheBench run; limits the requests that a slow contestant gets.
    batches: batch sizes, for the curves of time against batch size.
    repeats: timed runs behind each median.
    images: images that Vignette captions in one throughput run.
    hold: length of an open-loop test in multiples of the latency bound: a test that is too short
        passes rates that can't be sustained.
    rates: open-loop rates to try for each bound; with one, Vignette's only.
    replayed: captions in each replay of a scheduling policy.
    ablation_batch: batch size of the ablation's static steps.
    scenes: held-out scenes of the demo model, of each kind.
    least_queries: fewest queries of an open-loop test.
    most_hosts: hosts of a simulated cluster, at most.
    """

    engine: Path = ENGINE
    clients: tuple[int, ...] = (1, 8, 16, 64)
    requests: tuple[int, ...] = (32, 256)
    budget: int = 16
    precisions: tuple[str, ...] = PRECISIONS
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
    precisions=PRECISIONS[-1:],
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
