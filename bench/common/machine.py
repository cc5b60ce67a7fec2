"""The machine: its description, its peak rates, and the share of them that the engine reaches."""

import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import onnxruntime as ort
from tqdm import tqdm

from bench.common import calls
from bench.common.isolated import isolated
from bench.common.settings import PRECISIONS, SHAPE, TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from runtime.engine import Engine
from runtime.planning.config import EngineConfig
from runtime.planning.machine import this_machine
from runtime.providers.session import Placement, session_options

# The peak (a key of `_peaks`) that bounds an encoder, by its precision and execution provider.
_ARITHMETIC = {
    "fp32 on openvino": f"{PRECISIONS[-1]}, Gop/s",
    "fp32 on cpu": "fp32, Gop/s",
    "int8 on cpu": "int8, Gop/s",
    "int8-static on openvino": "int8, Gop/s",
}
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-openvino", "torch", "transformers",
             "litserve", "tornado", "numpy", "pillow")  # fmt: skip


def about() -> dict[str, Any]:
    """Machine, package versions and commit, for the results."""
    return {
        "machine": str(this_machine()),
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "-s") else ""),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def measure(settings: Settings) -> dict[str, Any]:
    """Peaks; work, seconds and roofline floor of encoding an image and of a decode step."""
    with tqdm(total=3, desc="roofline", unit="part") as progress:
        peaks = isolated(_peaks)
        progress.update()
        work = isolated(encoder_work)
        progress.update()
        reached = isolated(_reached, settings)
        progress.update()
    peak = peaks[_ARITHMETIC[reached["encoder"]]] * 1e9
    read = peaks["reading, GB/s"] * 1e9
    return {
        "peaks": peaks,
        "encoder": {
            "name": reached["encoder"],
            "work": work["encoder_flop"],
            "seconds": reached["encode_s"],
            "floor": work["encoder_flop"] / peak,
        },
        "decoder": {
            "name": reached["decoder"],
            "rows": reached["rows"],
            "work": reached["step_bytes"],
            "seconds": reached["step_s"],
            "floor": reached["step_bytes"] / read,
        },
    }


def _peaks() -> dict[str, float]:
    """Peak rates: matrix products (best of PyTorch and ONNX Runtime), reading an uncached array."""
    import torch

    from bench.contestants.model import DTYPES

    size = 2048
    work = 2 * size**3
    rates: dict[str, list[float]] = {name: [] for name in (*PRECISIONS, "int8")}
    for name in PRECISIONS:
        a, b = (torch.randn(size, size).to(DTYPES[name]) for _ in range(2))
        rates[name].append(work / _best_s(partial(torch.matmul, a, b)))
    for name in ("fp32", "int8"):
        session, feeds = _product(name, size)
        rates[name].append(work / _best_s(partial(session.run, None, feeds)))
    found = {f"{name}, Gop/s": max(of) / 1e9 for name, of in rates.items()}
    found["fp32 in PyTorch, Gop/s"] = rates["fp32"][0] / 1e9
    large = torch.ones(2**27)
    found["reading, GB/s"] = large.numel() * 4 / _best_s(large.sum) / 1e9
    return found


def _best_s(action: Callable[[], object]) -> float:
    action()
    return min(seconds(action) for _ in range(9))


def _product(precision: str, size: int) -> tuple[ort.InferenceSession, dict[str, np.ndarray]]:
    """A matrix product with constant weights, on ONNX Runtime as engines run on it; int8: uint8
    times int8.
    """
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight: np.ndarray = rng.integers(-127, 127, (size, size), np.int8)
    x: np.ndarray = rng.integers(0, 255, (size, size), np.uint8)
    name, types = "MatMulInteger", (TensorProto.UINT8, TensorProto.INT32)
    if precision == "fp32":
        name, types = "MatMul", (TensorProto.FLOAT, TensorProto.FLOAT)
        weight, x = weight.astype(np.float32), x.astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node(name, ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", types[0], [size, size])],
        [helper.make_tensor_value_info("y", types[1], [size, size])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = session_options(Placement("cpu"))
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, {"x": x}


def encoder_work() -> dict[str, float]:
    """Floating-point operations of the encoder for one image, counted by PyTorch.

    Counts the fused encoder: the plain module computes keys and values twice, its graph does not.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from export.fused_prefix import FusedImagePrefix
    from export.random_weights import random_weights

    checkpoint = random_weights(SHAPE)
    how, size = checkpoint.normalisation, checkpoint.sizes.image
    encoder = FusedImagePrefix(checkpoint.model, how.rescale, how.mean, how.std)
    with (
        sdpa_kernel(SDPBackend.MATH),  # the only backend that the counter supports on a CPU
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
    ):
        encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    return {"encoder_flop": float(counter.get_total_flops())}


def _reached(settings: Settings) -> dict[str, Any]:
    engine = Engine.open(settings.engine, EngineConfig())
    runner, manifest = engine.runner, engine.manifest
    slots = engine.slots
    batch = pictures(engine.encode_batch, manifest.sizes.pixels)
    encode = median_s(lambda: calls.encode(runner, batch), 3 * settings.repeats)
    tokens, fed = [manifest.tokens.bos] * slots, [TOKENS // 2] * slots
    step = median_s(lambda: calls.decode(runner, tokens, fed), 9 * settings.repeats)
    plan = runner.plan
    encoder, decoder, cache = plan.combination.split("/")
    return {
        "encoder": f"{encoder} on {plan.encoder_provider}",
        "decoder": f"{decoder} on {plan.decoder_provider}, K/V {cache}",
        "rows": slots,
        "encode_s": encode / len(batch),
        "step_s": step,
        "step_bytes": step_bytes(engine, slots),
    }


def step_bytes(engine: Engine, rows: int) -> int:
    """Bytes of weights (without the embedding table) and K/V cache that a decode step reads."""
    manifest, sizes = engine.manifest, engine.manifest.sizes
    plan = engine.runner.plan
    variant = manifest.variant("decoder", manifest.combination(plan.combination))
    width = np.dtype(variant.cache).itemsize
    number = 2 if variant.precision == "fp16" else 4
    embedding = sizes.vocabulary * sizes.heads * sizes.head * number
    weights = variant.weights - embedding
    positions = sizes.prefix + TOKENS // 2
    return weights + rows * 2 * sizes.layers * sizes.heads * positions * sizes.head * width
