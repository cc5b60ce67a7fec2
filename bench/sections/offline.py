"""Captions without a server: throughput of all images at once, latency of a single one."""

import resource
import statistics
import time
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.common.isolated import Failed, isolated
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from runtime.engine import Engine
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig
from runtime.providers import registry

_COMPARED = 4  # images whose tokens are compared
_LONG_S = 15.0  # seconds; a run that takes longer is not repeated


def measure(settings: Settings, curves: dict[str, Any]) -> dict[str, Any]:
    """Both sides, their ratios, and whether their fp32 tokens are equal.

    curves: results of the section `batches`, for PyTorch's best batch size; may be empty.
    """
    combinations = [c.name for c in manifests.load(settings.engine).combinations]
    wanted = [
        c for c in ("fp32/fp32/float32", "fp32/int8/int8", "int8/int8/int8") if c in combinations
    ]
    torch_jobs = [(p, _best_batch(p, settings, curves), settings) for p in settings.precisions]
    ours_jobs = [(c, "cpu", settings) for c in wanted] + _on_openvino(combinations, settings)
    found: dict[str, Any] = {"torch": [], "vignette": [], "failed": []}
    with tqdm(
        total=len(torch_jobs) + len(ours_jobs), desc="offline", unit="contestant"
    ) as progress:
        for side, function, jobs in (
            ("torch", _torch, torch_jobs),
            ("vignette", _vignette, ours_jobs),
        ):
            for job in jobs:
                try:
                    found[side].append(isolated(function, *job))
                except Failed as failure:
                    found["failed"].append(f"{side} {job[0]}: {failure}")
                progress.update()
    return found | _compared(found, curves)


def _points(precision: str, curves: dict[str, Any]) -> list[tuple[int, float]]:
    """PyTorch's milliseconds an image by batch size; empty if they were not measured."""
    return curves.get("series", {}).get(f"PyTorch {precision}", {}).get("points", [])


def _best_batch(precision: str, settings: Settings, curves: dict[str, Any]) -> int:
    points = _points(precision, curves)
    return min(points, key=lambda p: p[1])[0] if points else max(settings.torch_batches)


def _on_openvino(combinations: list[str], settings: Settings) -> list[tuple[str, str, Settings]]:
    if "openvino" not in registry.available():
        return []
    wanted = ("fp32/int8/int8", "int8-static/int8/int8")
    return [(c, "openvino", settings) for c in wanted if c in combinations]


def _compared(found: dict[str, Any], curves: dict[str, Any]) -> dict[str, Any]:
    """Throughput against PyTorch's best, here or in `curves`, latency against its single image;
    token equality.
    """
    best = {
        theirs["precision"]: min(
            *(row["ms_per_image"] for row in theirs["batches"]),
            *(ms for _, ms in _points(theirs["precision"], curves)),
        )
        for theirs in found["torch"]
    }
    ratios: list[dict[str, Any]] = []
    for ours in found["vignette"]:
        for theirs in found["torch"]:
            ratios.append(
                {
                    "vignette": ours["name"],
                    "torch": theirs["precision"],
                    "throughput": best[theirs["precision"]] / ours["ms_per_image"],
                    "latency": theirs["batches"][0]["ms_per_image"] / ours["one_ms"],
                }
            )
    exact = {row["precision"]: row["tokens"] for row in found["torch"]}.get("fp32")
    ours = next(
        (r["tokens"] for r in found["vignette"] if r["combination"].startswith("fp32/fp32")), None
    )
    unknown = exact is None or ours is None
    return {"best_ms": best, "ratios": ratios, "tokens_equal": None if unknown else exact == ours}


def _torch(precision: str, best_batch: int, settings: Settings) -> dict[str, Any]:
    from bench.contestants.model import TorchCaptioner

    model = TorchCaptioner(precision)
    images = [model.normalise(p) for p in pictures(max(best_batch, _COMPARED), (3, 224, 224))]
    model.generate(images[:1])
    rows = []
    for batch in dict.fromkeys((1, best_batch)):
        # Noise averages out in a long run: one is enough then, else two.
        times = [seconds(partial(model.generate, images[:batch]))]
        if times[0] < _LONG_S:
            times.append(seconds(partial(model.generate, images[:batch])))
        rows.append({"batch": batch, "ms_per_image": statistics.median(times) / batch * 1e3})
    return {"precision": precision, "batches": rows, "tokens": model.generate(images[:_COMPARED])}


def _vignette(combination: str, provider: str, settings: Settings) -> dict[str, Any]:
    start = time.perf_counter()
    engine = Engine.open(settings.engine, EngineConfig(provider=provider, precision=combination))
    ready = time.perf_counter() - start
    images = pictures(settings.images, engine.manifest.sizes.pixels)

    def caption(some: list[np.ndarray]) -> list[list[int]]:
        captions = engine.generate(some, max_new_tokens=TOKENS, ignore_eos=True)
        return [list(c.token_ids) for c in captions]

    return {
        "name": f"{combination} on {provider}",
        "combination": combination,
        "runs_on": engine.runs_on,
        "ready_s": ready,
        "ms_per_image": median_s(lambda: caption(images), settings.repeats) / len(images) * 1e3,
        "one_ms": median_s(lambda: caption(images[:1]), 3 * settings.repeats) * 1e3,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "tokens": caption(images[:_COMPARED]),
    }
