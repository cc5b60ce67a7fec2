"""A strong PyTorch baseline (`encoded_once`) against Vignette in the same run."""

from functools import partial
from typing import Any

from bench.common.isolated import Failed, isolated
from bench.common.settings import PRECISIONS, TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

_BATCHES = (1, 4, 8, 16, 32)


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds per image of each form by batch size, and the best one's ratio to Vignette's."""
    forms: list[dict[str, Any]] = []
    for compiled in (False, True):
        name = f"{PRECISIONS[-1]}, encoded once{', compiled' if compiled else ''}"
        try:
            forms.append({"name": name, "batches": isolated(_torch, compiled, settings.repeats)})
        except Failed as failure:
            forms.append({"name": name, "failed": str(failure)})
    ours = isolated(_vignette, settings)
    best = min((ms for f in forms for _, ms in f.get("batches", [])), default=None)
    return {"forms": forms, "ours_ms": ours, "ratio": best and best / ours}


def _torch(compiled: bool, repeats: int) -> list[tuple[int, float]]:
    from bench.contestants.encoded_once import EncodedOnce

    model, found = EncodedOnce(PRECISIONS[-1], compiled), []
    for batch in _BATCHES:
        images = pictures(batch, (3, 224, 224))
        for _ in range(2):  # the first compiles, the second compiles again if a shape was new
            seconds(partial(model.generate, images))
        ms = median_s(partial(model.generate, images), 3 * repeats) / batch * 1e3
        found.append((batch, ms))
    return found


def _vignette(settings: Settings) -> float:
    engine = Engine.open(settings.engine, EngineConfig(provider="cpu"))
    images = pictures(settings.images, engine.manifest.sizes.pixels)
    run = partial(engine.generate, images, max_new_tokens=TOKENS, ignore_eos=True)
    return median_s(run, settings.repeats) / len(images) * 1e3
