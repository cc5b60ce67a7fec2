"""The machine's peak rates, and the share of them that the engine reaches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from tqdm import tqdm

from bench.common import calls
from bench.common.isolated import isolated
from bench.common.settings import PRECISIONS, TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from bench.common.work import encoder_work, step_bytes
from runtime.engine import Engine
from runtime.planning.config import EngineConfig
from runtime.providers.session import Placement, session_options

# The peak (a key of `_peaks`) that bounds an encoder, by its precision and execution provider.
_ARITHMETIC = {
    "fp32 on openvino": f"{PRECISIONS[-1]}, Gop/s",
    "fp32 on cpu": "fp32, Gop/s",
    "int8 on cpu": "int8, Gop/s",
    "int8-static on openvino": "int8, Gop/s",
}


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
