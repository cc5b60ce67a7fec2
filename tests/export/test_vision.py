"""The encoder for GPUs computes what transformers' modules do, whatever the weights."""

import torch

from export.fused_prefix import FusedImagePrefix
from export.modeling import ImagePrefix
from export.random_weights import from_config
from tests.support.checkpoints import SHAPES, shaken


def test_the_fused_encoder_says_the_same():
    checkpoint = shaken(from_config("base", SHAPES["base"], seed=3))
    model, how = checkpoint.model, checkpoint.normalisation
    pixels = torch.randint(0, 256, (3, *checkpoint.sizes.pixels), dtype=torch.uint8)
    with torch.inference_mode():
        plain, fused = (
            kind(model, how.rescale, how.mean, how.std)(pixels)
            for kind in (ImagePrefix, FusedImagePrefix)
        )
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name].transpose(1, 2), expected, atol=1e-4, rtol=1e-4)
