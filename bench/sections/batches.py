"""`make batch_performance`: time per image against batch size."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from bench.common.arithmetic import knee
from bench.common.isolated import Failed, isolated
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from runtime.engine import Engine
from runtime.planning.config import EngineConfig


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds per image for each batch size, and the knee, beyond which little is gained."""
    jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]
    jobs = [(f"PyTorch {p}", _torch, (p, settings)) for p in settings.precisions]
    jobs.append(("Vignette", _vignette, (settings,)))
    series: dict[str, Any] = {}
    for name, function, arguments in tqdm(jobs, desc="batch sizes", unit="contestant"):
        try:
            points = isolated(function, *arguments)
        except Failed as failure:
            series[name] = {"failed": str(failure)}
        else:
            series[name] = {"points": points, "knee": knee(points)}
    return {"series": series}


def _torch(precision: str, settings: Settings) -> list[tuple[int, float]]:
    from bench.contestants.model import TorchCaptioner

    model = TorchCaptioner(precision)
    images = [model.normalise(p) for p in pictures(max(settings.torch_batches), (3, 224, 224))]
    model.generate(images[:1])
    points = []
    for batch in settings.torch_batches:  # each run takes seconds, so one is enough
        points.append((batch, seconds(partial(model.generate, images[:batch])) / batch * 1e3))
    return points


def _vignette(settings: Settings) -> list[tuple[int, float]]:
    engine = Engine.open(settings.engine, EngineConfig(slots=max(settings.batches)))
    images = pictures(max(settings.batches), engine.manifest.sizes.pixels)

    def caption(batch: int) -> None:
        engine.generate(images[:batch], max_new_tokens=TOKENS, ignore_eos=True)

    return [
        (batch, median_s(lambda: caption(batch), settings.repeats) / batch * 1e3)  # noqa: B023
        for batch in settings.batches
    ]
