"""Ablation: one optimisation at a time, from `generate` to the engine as served."""

from functools import partial
from typing import Any

from tqdm import tqdm

from bench.common.arithmetic import percentile
from bench.common.isolated import Failed, isolated
from bench.common.settings import SHAPE, TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from bench.load import arrivals
from runtime.engine import Engine
from runtime.planning.config import EngineConfig
from runtime.providers import registry

_LENGTHS = (4, 28)  # shortest and longest caption, in tokens, of the load that compares batching


def measure(settings: Settings) -> dict[str, Any]:
    """Milliseconds per image after each step; steps that can't run here say why."""
    static: tuple[tuple[str, str], ...] = (
        ("cache in place, logits left where they are", "fp32/fp32/float32"),
        ("8-bit decoder weights", "fp32/int8/float32"),
        ("8-bit K/V cache", "fp32/int8/int8"),
    )
    steps: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("Hugging Face generate, fp32", _generate, (settings,)),
        ("image encoded once, same PyTorch", _plain_loop, ("torch", settings)),
        ("ONNX Runtime, fp32, new cache each step", _plain_loop, ("onnx", settings)),
        *((name, _engine, (c, "cpu", 1, settings)) for name, c in static),
        (
            "encoder on OpenVINO (bf16 with AMX)",
            _engine,
            ("fp32/int8/int8", "openvino", None, settings),
        ),
        ("8-bit encoder, on the CPU provider", _engine, ("int8/int8/int8", "cpu", 1, settings)),
        (
            "each core encodes an image of its own",
            _engine,
            ("int8/int8/int8", "cpu", None, settings),
        ),
    ]
    rows: list[dict[str, Any]] = []
    for name, function, arguments in tqdm(steps, desc="ablation", unit="step"):
        if "openvino" in arguments and "openvino" not in registry.available():
            rows.append({"step": name, "note": "left out: OpenVINO serves Intel processors only"})
            continue
        try:
            rows.append({"step": name, "ms_per_image": isolated(function, *arguments)})
        except Failed as failure:
            rows.append({"step": name, "failed": str(failure).partition(": ")[2] or str(failure)})
    return {"steps": rows, "batching": isolated(_batching, settings)}


def _generate(settings: Settings) -> float:
    from bench.contestants.model import TorchCaptioner

    model = TorchCaptioner("fp32")
    images = [model.normalise(p) for p in pictures(settings.ablation_batch, (3, 224, 224))]
    model.generate(images[:1])  # warm-up; the batch takes most of a minute, so it runs once
    return seconds(lambda: model.generate(images)) / len(images) * 1e3


def _plain_loop(kind: str, settings: Settings) -> float:
    """Export's verification loop: static batch, a new cache tensor at each step."""
    from export import reference
    from export.random_weights import random_weights

    checkpoint = random_weights(SHAPE)
    graphs: reference.Graphs
    if kind == "torch":
        graphs = reference.TorchGraphs(checkpoint)
    else:
        files = (settings.engine / f"{graph}.onnx" for graph in ("encoder", "decoder"))
        graphs = reference.OnnxGraphs(*files)
    shape = (3, checkpoint.sizes.image, checkpoint.sizes.image)
    cases = [
        reference.Case(p, [checkpoint.tokens.bos]) for p in pictures(settings.ablation_batch, shape)
    ]
    run = lambda: list(  # noqa: E731
        reference.caption(graphs, checkpoint.sizes, checkpoint.tokens, cases, TOKENS, stagger=1)
    )
    return median_s(run, settings.repeats) / len(cases) * 1e3


def _engine(combination: str, provider: str, encode_batch: int | None, settings: Settings) -> float:
    batch = settings.ablation_batch
    config = EngineConfig(
        provider=provider, precision=combination, slots=batch, encode_batch=encode_batch,
        refill=False,
    )  # fmt: skip
    engine = Engine.open(settings.engine, config)
    images = pictures(batch, engine.manifest.sizes.pixels)
    run = lambda: engine.generate(images, max_new_tokens=TOKENS, ignore_eos=True)  # noqa: E731
    return median_s(run, settings.repeats) / batch * 1e3


def _batching(settings: Settings) -> dict[str, Any]:
    """Static against continuous batching: captions of uneven length, the same offered load."""
    engines = {
        name: Engine.open(settings.engine, EngineConfig(refill=refill))
        for name, refill in (("static", False), ("continuous", True))
    }
    images = pictures(16, engines["static"].manifest.sizes.pixels)
    work = arrivals.jobs(images, settings.images, *_LENGTHS)
    found: dict[str, Any] = {}
    for name, engine in engines.items():
        found[name] = {"rate": len(work) / seconds(partial(_all_at_once, engine, work))}
    rate = 0.8 * min(row["rate"] for row in found.values())
    waits: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(settings.repeats):  # in turns: a slow minute is slow for both
        for name, engine in engines.items():
            waits[name] += arrivals.poisson(engine, work, rate)
    for name, times in waits.items():
        found[name] |= {
            "mean_ms": sum(times) / len(times) * 1e3,
            "p99_ms": percentile(times, 0.99) * 1e3,
        }
    return found


def _all_at_once(engine: Engine, work: list[arrivals.Job]) -> None:
    arrivals.closed_loop(engine, work, len(work))
