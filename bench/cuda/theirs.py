"""What is measured of PyTorch on the same GPU: its peak rates, and how fast it captions.

PyTorch is imported when it is needed: it loads CUDA libraries, and the engine's come first.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from bench.common.timing import median_s, pictures, seconds
from bench.cuda.extent import ONCE, Extent

_GIB = 2**30


def peaks() -> dict[str, float]:
    """Peak rates: fp16 matrix products in operations/s, copying (reads plus writes) in bytes/s."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    large = torch.ones(_GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(large)

    def best(action: Callable[[], object]) -> float:
        def waited() -> None:
            action()
            torch.cuda.synchronize()

        for _ in range(3):
            waited()
        return min(seconds(waited) for _ in range(10))

    return {
        "fp16_ops": 2 * size**3 / best(lambda: torch.matmul(a, b)),
        "bandwidth": 2 * _GIB / best(lambda: target.copy_(large)),
    }


def torch_side(extent: Extent) -> dict[str, dict[int, float]]:
    """Seconds per image in PyTorch, by mode and batch size."""
    import torch

    from bench.contestants.encoded_once import EncodedOnce
    from bench.contestants.model import TorchCaptioner

    found: dict[str, dict[int, float]] = {}
    pixels = pictures(max(extent.torch_batches), (3, 224, 224))
    for mode in extent.torch_modes:
        precision, *how = mode.split()
        if mode.startswith(ONCE):
            model: Any = EncodedOnce(precision, "compiled" in how, "cuda")
            images: list[Any] = pixels
        else:
            model = TorchCaptioner(precision, "cuda", "compiled" in how)
            images = [model.normalise(p) for p in pixels]
        found[mode] = {}
        for batch in extent.torch_batches:
            run = partial(model.generate, images[:batch])
            run()  # compiles again if a shape was new
            found[mode][batch] = median_s(run, extent.repeats) / batch
        del model
        torch.cuda.empty_cache()
    return found
