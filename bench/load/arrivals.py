"""Load on an engine in this process: clients that ask again, and arrivals that don't wait."""

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from runtime.engine import Engine
from runtime.request import Terms

Job = tuple[np.ndarray, int]  # pixels, tokens of its caption
# How many captions have so many words, of the first 181 of COCO's training split (Karpathy's), by
# the list in github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning/issues/12.
_COCO_WORDS = {
    8: 33, 9: 42, 10: 33, 11: 33, 12: 16, 13: 10, 14: 6, 15: 1, 16: 1, 17: 2, 18: 1, 20: 1, 21: 1,
    25: 1,
}  # fmt: skip


def jobs(images: list[np.ndarray], count: int, shortest: int, longest: int) -> list[Job]:
    """Captions of uneven length; the same at every call."""
    rng = random.Random(0)
    return [(rng.choice(images), rng.randint(shortest, longest)) for _ in range(count)]


def coco_jobs(images: list[np.ndarray], count: int) -> list[Job]:
    """Captions as long as COCO's, a token a word and the end token; the same at every call."""
    rng = random.Random(0)
    words = rng.choices(list(_COCO_WORDS), list(_COCO_WORDS.values()), k=count)
    return [(rng.choice(images), n + 1) for n in words]


def closed_loop(engine: Engine, work: list[Job], clients: int) -> list[float]:
    """Each client submits its next job when the last is done -> seconds of each, in their order."""
    waits: list[float] = []
    coming = iter(work)
    for pixels, tokens in itertools.islice(coming, clients):
        engine.submit(pixels, None, tokens, ignore_eos=True)
    while not engine.scheduler.idle:
        for done in engine.step():
            waits.append((done.finished_at or 0) - done.submitted_at)
            for pixels, tokens in itertools.islice(coming, 1):
                engine.submit(pixels, None, tokens, ignore_eos=True)
    return waits


def poisson(
    engine: Engine,
    work: list[Job],
    rate: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[float]:
    """Jobs come at `rate` a second whatever happens -> seconds of each from when it was due.

    clock, sleep: the engine's time.
    """
    waits: list[float] = []
    coming = deque(zip(_due(rate, len(work)), work, strict=True))
    start = clock()
    while coming or not engine.scheduler.idle:
        while coming and start + coming[0][0] <= clock():
            due, (pixels, tokens) = coming.popleft()
            engine.submit(pixels, None, tokens, True, Terms(submitted_at=start + due))
        if engine.scheduler.idle:
            sleep(max(0.0, start + coming[0][0] - clock()))
            continue
        waits += [s.finished_at - s.submitted_at for s in engine.step() if s.finished_at]
    return waits


def _due(rate: float, count: int) -> Iterator[float]:
    rng = random.Random(1)
    return itertools.accumulate(rng.expovariate(rate) for _ in range(count))
