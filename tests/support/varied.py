"""Pictures like the samples, and how often an engine says of them what PyTorch says."""

import random
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from export.checkpoint import load
from export.reference import Case, TorchGraphs, caption
from runtime.engine import Engine
from runtime.model.preprocess import to_pixels
from tests.support.paths import ROOT, SAMPLES

_TOKENS = 20


def pictures(count: int) -> Iterator[Image.Image]:
    """Sample images, randomly cropped and some of them mirrored; the same at every call."""
    rng = random.Random(1)
    files = sorted(SAMPLES.glob("*.png"))
    for n in range(count):
        image = Image.open(files[n % len(files)]).convert("RGB")
        left, top, right, bottom = (rng.uniform(0, 0.1) for _ in range(4))
        box = (left * image.width, top * image.height, (1 - right) * image.width,
               (1 - bottom) * image.height)  # fmt: skip
        image = image.crop(tuple(map(round, box)))
        yield ImageOps.mirror(image) if rng.random() < 0.5 else image


def agreement(engine: Engine, count: int) -> float:
    """Share of the demo model's captions whose tokens equal fp32 PyTorch's."""
    checkpoint = load(str(ROOT / "demo" / "model"))
    rows = [to_pixels(picture, checkpoint.preprocessing) for picture in pictures(count)]
    cases = [Case(np.ascontiguousarray(row), [checkpoint.tokens.bos]) for row in rows]
    sizes, special = checkpoint.sizes, checkpoint.tokens
    expected = [
        tuple(a.tokens) for a in caption(TorchGraphs(checkpoint), sizes, special, cases, _TOKENS)
    ]
    assert len(set(expected)) > 10, "pictures that all say the same prove nothing"
    said = [c.token_ids for c in engine.generate(rows, max_new_tokens=_TOKENS)]
    return sum(a == b for a, b in zip(said, expected, strict=True)) / count
