"""Beam search against Hugging Face's, and its cost relative to greedy decoding here."""

from functools import partial
from typing import Any

from bench.common.isolated import isolated
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

_BEAMS = 4


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds per image with beams on both sides, their ratios, and beams' to greedy here."""
    theirs = {p: isolated(_torch, p) for p in settings.precisions}
    ours = isolated(_vignette, settings)
    return {
        "beams": _BEAMS,
        "torch_s": theirs,
        "vignette": ours,
        "ratios": {p: s / ours["beams_s"] for p, s in theirs.items()},
        "against_greedy": ours["beams_s"] / ours["greedy_s"],
    }


def _torch(precision: str) -> float:
    """Seconds for one image; larger batches are no faster per image there."""
    from bench.contestants.model import TorchCaptioner

    model = TorchCaptioner(precision)
    images = [model.normalise(p) for p in pictures(1, (3, 224, 224))]
    model.generate(images)
    return seconds(partial(model.generate, images, beams=_BEAMS))


def _vignette(settings: Settings) -> dict[str, Any]:
    engine = Engine.open(settings.engine, EngineConfig(provider="cpu"))
    images = pictures(settings.images, engine.manifest.sizes.pixels)
    greedy = partial(engine.generate, max_new_tokens=TOKENS, ignore_eos=True)
    beams = partial(greedy, num_beams=_BEAMS)
    return {
        "runs_on": engine.runs_on,
        "greedy_s": median_s(partial(greedy, images), settings.repeats) / len(images),
        "beams_s": median_s(partial(beams, images), settings.repeats) / len(images),
        "greedy_one_s": median_s(partial(greedy, images[:1]), 3 * settings.repeats),
        "beams_one_s": median_s(partial(beams, images[:1]), 3 * settings.repeats),
    }
