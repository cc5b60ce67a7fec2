"""The self-test: at every start, a few captions must equal those of PyTorch at export.

It detects faults that no checksum can: a provider that computes nonsense on this kind of machine, a
wrong driver, a kernel that differs in another version of a library.
"""

import random
import time

import numpy as np

from runtime.errors import ProviderError
from runtime.execution.base import ModelRunner
from runtime.model.manifest import SelfTest, Sizes, SpecialTokens

PICTURES, TOKENS = 2, 8  # pictures, and most new tokens for each: a tenth of a second on a CPU
_CELLS = 4  # coloured blocks across and down a picture
_NOISE = 15


def picture(seed: int, sizes: Sizes) -> np.ndarray:
    """Coloured blocks with noise, uint8 of shape `sizes.pixels`; equal on any machine."""
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
    """Caption the pictures on a runner; returns seconds per picture.

    expected: None (random weights) compares nothing. Raises ProviderError for a wrong caption.
    """
    seeds = expected.seeds if expected else tuple(range(PICTURES))
    most = min(TOKENS, runner.text_tokens)
    pixels = [picture(seed, sizes) for seed in seeds]
    started = time.perf_counter()
    said = [_caption(runner, each, special, most) for each in pixels]
    seconds = (time.perf_counter() - started) / len(pixels)
    wanted = [list(tokens[:most]) for tokens in expected.tokens] if expected else said
    if wrong := [n for n, tokens in enumerate(wanted) if said[n] != tokens]:
        raise ProviderError(
            f"the self-test failed: picture {wrong[0] + 1} of {len(pixels)} is captioned "
            f"{said[wrong[0]]} and not {wanted[wrong[0]]} (token ids). Something computes "
            "otherwise here than at export: try another --provider or --precision, another "
            "version of the driver or of ONNX Runtime, or export the engine again"
        )
    return seconds


def _caption(
    runner: ModelRunner, pixels: np.ndarray, special: SpecialTokens, most: int
) -> list[int]:
    """Greedy tokens of one picture, `most` at most, including the end token."""
    runner.encode([pixels], [[0]])
    said: list[int] = []
    token = special.bos
    for fed in range(most):
        found = runner.decode([token], [fed]).wait()
        token = int(found.ids[0, 0, 0])
        said.append(token)
        if token == special.eos or np.isnan(found.logprobs[0, 0, 0]):
            break
    return said
