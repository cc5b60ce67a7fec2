"""The work of an encoder call and of a decode step, which no implementation can do without."""

import numpy as np

from bench.common.settings import SHAPE, TOKENS
from runtime.engine import Engine


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
