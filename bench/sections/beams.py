"""Beam search against Hugging Face's, and its cost relative to greedy decoding here."""

from functools import partial
from typing import Any

from bench.common.isolated import isolated
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s, pictures
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

_BEAMS, _BATCHES = 4, (1, 4)  # batch sizes of Hugging Face's


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds per image with beams on both sides, of many images and of one; beams' ratio to
    greedy here. Of Hugging Face's batch sizes the fastest one is compared with many images.
    """
    theirs = {p: isolated(_torch, p) for p in settings.precisions}
    ours = isolated(_vignette, settings)
    return {
        "beams": _BEAMS,
        "torch_s": theirs,
        "vignette": ours,
        "ratios": {p: min(s for _, s in theirs[p]) / ours["beams_s"] for p in theirs},
        "ratios_of_one": {p: theirs[p][0][1] / ours["beams_one_s"] for p in theirs},
        "against_greedy": ours["beams_s"] / ours["greedy_s"],
    }


def _torch(precision: str) -> list[tuple[int, float]]:
    """Seconds per image by batch size; each takes long enough for noise to average out."""
    from bench.contestants.model import TorchCaptioner

    model = TorchCaptioner(precision)
    images = [model.normalise(p) for p in pictures(max(_BATCHES), (3, 224, 224))]
    model.generate(images[:1])
    runs = {n: partial(model.generate, images[:n], beams=_BEAMS) for n in _BATCHES}
    return [(n, median_s(run, 1) / n) for n, run in runs.items()]


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
