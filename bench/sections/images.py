"""Preprocessing: images per second on one core, and what scaled decoding changes."""

import io
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.common.settings import Settings
from bench.common.timing import median_s
from runtime.model import manifest as manifests
from runtime.model.preprocess import decode, preprocess, to_pixels

_SIZES = ((640, 480), (4000, 3000))


def measure(settings: Settings) -> dict[str, Any]:
    """For each size: images per second on one core, decoded in full and as served."""
    how = manifests.load(settings.engine).preprocessing
    rows = []
    for width, height in tqdm(_SIZES, desc="preprocessing", unit="size"):
        data = jpeg(width, height)
        exact = to_pixels(decode(data), how)
        served = preprocess(data, how)
        rows.append(
            {
                "image": f"{width} x {height} JPEG, {len(data) / 1e3:.0f} kB",
                "served_per_s": 1 / median_s(lambda: preprocess(data, how), 9),  # noqa: B023
                "exact_per_s": 1 / median_s(lambda: to_pixels(decode(data), how), 9),  # noqa: B023
                "mean_difference": float(np.abs(served.astype(int) - exact).mean()),
            }
        )
    return {"rows": rows}


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of colour patches with fine grain: about as costly to decode as a photograph."""
    rng = np.random.default_rng(0)
    patches = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    smooth = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.normal(0, 6, (height, width, 1)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=85
    )
    return buffer.getvalue()
