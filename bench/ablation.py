"""Where the speed comes from: one step at a time from `generate` to what is served."""

import itertools
import random
import time
from collections import deque
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.isolated import Failed, isolated
from bench.offline import median_s, pictures, seconds
from bench.settings import SHAPE, TOKENS, Settings
from runtime.config import EngineConfig
from runtime.engine import Engine

_BATCH = 8  # of the static steps
_LENGTHS = (4, 28)  # shortest and longest caption of the load that compares batching


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds an image after each step; steps that can't run here say why."""
    static: tuple[tuple[str, str], ...] = (
        ("cache in place (GroupQueryAttention)", "fp32/fp32/float32"),
        ("8-bit decoder weights", "fp32/int8/float32"),
        ("8-bit K/V cache", "fp32/int8/int8"),
    )
    steps: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("Hugging Face generate, fp32", _generate, (settings.torch_batches[-1],)),
        ("image encoded once, same PyTorch", _plain_loop, ("torch", settings)),
        ("ONNX Runtime, fp32", _plain_loop, ("onnx", settings)),
        *((name, _engine, (c, "cpu", settings)) for name, c in static),
        ("encoder on OpenVINO (bf16 with AMX)", _engine, ("fp32/int8/int8", "openvino", settings)),
        ("8-bit encoder", _engine, ("int8/int8/int8", "cpu", settings)),
    ]
    rows: list[dict[str, Any]] = []
    for name, function, arguments in tqdm(steps, desc="ablation", unit="step"):
        try:
            rows.append({"step": name, "ms_per_image": isolated(function, *arguments)})
        except Failed as failure:
            rows.append({"step": name, "failed": str(failure).partition(": ")[2] or str(failure)})
    batching = {
        name: isolated(_uneven_load, refill, settings)
        for name, refill in (("static", False), ("continuous", True))
    }
    return {"steps": rows, "batching": batching}


def _generate(batch: int) -> float:
    from bench.baselines.model import TorchCaptioner

    model = TorchCaptioner("fp32")
    images = [model.normalise(p) for p in pictures(batch, (3, 224, 224))]
    model.generate(images[:1])
    return seconds(lambda: model.generate(images)) / batch * 1e3


def _plain_loop(kind: str, settings: Settings) -> float:
    """The loop that export proves graphs with: static batch, each step's cache a new tensor."""
    from export import greedy
    from export.random_weights import random_weights

    checkpoint = random_weights(SHAPE)
    graphs: greedy.Graphs
    if kind == "torch":
        graphs = greedy.TorchGraphs(checkpoint)
    else:
        files = (settings.engine / f"{graph}.onnx" for graph in ("encoder", "decoder"))
        graphs = greedy.OnnxGraphs(*files)
    shape = (3, checkpoint.sizes.image, checkpoint.sizes.image)
    cases = [greedy.Case(p, [checkpoint.tokens.bos]) for p in pictures(_BATCH, shape)]
    run = lambda: list(  # noqa: E731
        greedy.caption(graphs, checkpoint.sizes, checkpoint.tokens, cases, TOKENS)
    )
    return median_s(run, settings.repeats) / _BATCH * 1e3


def _engine(combination: str, provider: str, settings: Settings) -> float:
    config = EngineConfig(
        provider=provider, precision=combination, slots=_BATCH, encode_batch=_BATCH, refill=False
    )
    engine = Engine.open(settings.engine, config)
    images = pictures(_BATCH, engine.runner.pixels_shape)
    run = lambda: engine.generate(images, max_new_tokens=TOKENS, ignore_eos=True)  # noqa: E731
    return median_s(run, settings.repeats) / _BATCH * 1e3


def _uneven_load(refill: bool, settings: Settings) -> dict[str, float]:
    """Captions of uneven length: all at once for the rate, then at 80 % of it for the wait."""
    engine = Engine.open(settings.engine, EngineConfig(refill=refill))
    rng = random.Random(0)
    images = pictures(settings.images, engine.runner.pixels_shape)
    work = [(pixels, rng.randint(*_LENGTHS)) for pixels in images]
    engine.generate(images[:4], max_new_tokens=TOKENS, ignore_eos=True)
    start = time.perf_counter()
    open_loop(engine, [(0.0, *job) for job in work])
    capacity = len(work) / (time.perf_counter() - start)
    due = itertools.accumulate(rng.expovariate(0.8 * capacity) for _ in work)
    waits = open_loop(engine, [(at, *job) for at, job in zip(due, work, strict=True)])
    return {"rate": capacity, "mean_ms": sum(waits) / len(waits) * 1e3}


def open_loop(engine: Engine, arrivals: list[tuple[float, np.ndarray, int]]) -> list[float]:
    """Submit each `(second, pixels, tokens)` when it is due -> seconds from then to its caption."""
    waits: list[float] = []
    coming = deque(arrivals)
    start = time.perf_counter()
    while coming or not engine.scheduler.idle:
        while coming and start + coming[0][0] <= time.perf_counter():
            due, pixels, tokens = coming.popleft()
            engine.submit(pixels, None, tokens, ignore_eos=True, submitted_at=start + due)
        if engine.scheduler.idle:
            time.sleep(max(0.0, start + coming[0][0] - time.perf_counter()))
            continue
        waits += [s.finished_at - s.submitted_at for s in engine.step() if s.finished_at]
    return waits
