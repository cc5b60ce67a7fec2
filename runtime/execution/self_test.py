"""A few captions that every start has to say: those of PyTorch, at export.

They find what no checksum can: a provider that computes nonsense on this kind of machine, a wrong
driver, a kernel that another version of a library computes otherwise.
"""

import random
import time

import numpy as np

from runtime.errors import ProviderError
from runtime.execution.base import ModelRunner
from runtime.model.manifest import SelfTest, Sizes, SpecialTokens

PICTURES, TOKENS = 2, 8  # of them, and most new tokens for each: a tenth of a second on a processor
_CELLS = 4  # a picture is so many coloured blocks wide and high
_NOISE = 15


def picture(seed: int, sizes: Sizes) -> np.ndarray:
    """Coloured blocks with noise, uint8 of `sizes.pixels`: the same for a seed on any machine."""
    *frames, bands, height, width = sizes.pixels
    count = frames[0] if frames else 1
    made = random.Random(seed)
    blocks = np.frombuffer(made.randbytes(count * bands * _CELLS**2), np.uint8)
    blocks = blocks.reshape(count, bands, _CELLS, _CELLS)
    rows, columns = (np.arange(n) * _CELLS // n for n in (height, width))
    noise = np.frombuffer(made.randbytes(count * bands * height * width), np.uint8) % (_NOISE + 1)
    pixels = blocks[:, :, rows][:, :, :, columns] // 2 + noise.reshape(count, bands, height, width)
    return pixels.astype(np.uint8).reshape(sizes.pixels)


def check(
    runner: ModelRunner, sizes: Sizes, special: SpecialTokens, expected: SelfTest | None
) -> float:
    """Have a runner caption the pictures; the seconds that it took for each.

    expected: None (random weights) compares nothing. Raises ProviderError if it says anything else.
    """
    seeds = expected.seeds if expected else tuple(range(PICTURES))
    pixels = [picture(seed, sizes) for seed in seeds]
    started = time.perf_counter()
    said = [_caption(runner, each, special) for each in pixels]
    seconds = (time.perf_counter() - started) / len(pixels)
    if expected and (wrong := [n for n, t in enumerate(expected.tokens) if tuple(said[n]) != t]):
        raise ProviderError(
            f"the self-test failed: picture {wrong[0] + 1} of {len(pixels)} is captioned "
            f"{said[wrong[0]]} and not {list(expected.tokens[wrong[0]])} (token ids). Something "
            "computes otherwise here than at export: try another --provider or --precision, "
            "another version of the driver or of ONNX Runtime, or export the engine again"
        )
    return seconds


def _caption(runner: ModelRunner, pixels: np.ndarray, special: SpecialTokens) -> list[int]:
    """Its tokens, the end token included."""
    runner.encode([pixels], [[0]])
    said: list[int] = []
    token = special.bos
    for fed in range(TOKENS):
        found = runner.decode([token], [fed])
        token = int(found.ids[0, 0, 0])
        said.append(token)
        if token == special.eos or np.isnan(found.logprobs[0, 0, 0]):
            break
    return said
