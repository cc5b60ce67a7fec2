"""Load on an engine in this process: closed loop and Poisson arrivals.

Both step the engine by hand, because its clock may be simulated (`bench.load.replay`).
"""

import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from msgspec.structs import replace

from runtime.engine import Engine
from runtime.request import GenerationRequest, SchedulingParams

Job = tuple[np.ndarray, int]  # pixels, tokens of the caption
# Words of a caption -> number of captions, in the first 181 of COCO's training split (Karpathy's),
# by the list in github.com/sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning/issues/12.
_COCO_WORDS = {
    8: 33, 9: 42, 10: 33, 11: 33, 12: 16, 13: 10, 14: 6, 15: 1, 16: 1, 17: 2, 18: 1, 20: 1, 21: 1,
    25: 1,
}  # fmt: skip


def jobs(images: list[np.ndarray], count: int, shortest: int, longest: int) -> list[Job]:
    """Jobs of `shortest` to `longest` tokens, uniformly drawn; the same at every call."""
    rng = random.Random(0)
    return [(rng.choice(images), rng.randint(shortest, longest)) for _ in range(count)]


def coco_jobs(images: list[np.ndarray], count: int) -> list[Job]:
    """Jobs as long as COCO's captions, a token a word and the end token; the same at every call."""
    rng = random.Random(0)
    words = rng.choices(list(_COCO_WORDS), list(_COCO_WORDS.values()), k=count)
    return [(rng.choice(images), n + 1) for n in words]


def requests(engine: Engine, work: Iterable[Job]) -> Iterator[GenerationRequest]:
    """A request for each job, made when it is taken; its caption has the job's length."""
    for pixels, tokens in work:
        yield engine.request(pixels, max_new_tokens=tokens, ignore_eos=True)


def closed_loop(engine: Engine, work: list[Job], clients: int) -> list[float]:
    """Each client submits its next job when the last is done -> seconds of each, as they end."""
    waits: list[float] = []
    coming = requests(engine, work)

    def submit(count: int) -> None:
        for request in itertools.islice(coming, count):
            engine.submit(request)

    submit(clients)
    while not engine.idle:
        for output in engine.step():
            assert output.timing is not None
            waits.append(output.timing.total_s)
            submit(1)
    assert len(waits) == len(work)
    return waits


def poisson(
    engine: Engine,
    work: list[Job],
    rate: float,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[float]:
    """Open loop: Poisson arrivals at `rate` jobs per second -> latencies in seconds from due times.

    clock, sleep: the engine's time.
    """
    waits: list[float] = []
    coming = deque(zip(_due(rate, len(work)), work, strict=True))
    start = clock()
    while coming or not engine.idle:
        while coming and start + coming[0][0] <= clock():
            due, (pixels, tokens) = coming.popleft()
            request = engine.request(pixels, max_new_tokens=tokens, ignore_eos=True)
            engine.submit(replace(request, scheduling=SchedulingParams(arrival_time=start + due)))
        if engine.idle:
            sleep(max(0.0, start + coming[0][0] - clock()))
            continue
        waits += [output.timing.total_s for output in engine.step() if output.timing]
    return waits


def _due(rate: float, count: int) -> Iterator[float]:
    rng = random.Random(1)
    return itertools.accumulate(rng.expovariate(rate) for _ in range(count))
