"""Small random checkpoints of every shape that the GIT family has."""

import torch
from transformers import GitConfig

from export.checkpoint import Checkpoint

_VISION = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}


def _small(vision: dict | None = None, **changes) -> GitConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 64,  # heads of 16: GroupQueryAttention needs a multiple of 8
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    }
    return GitConfig(vision_config={**_VISION, **(vision or {})}, **{**sizes, **changes})


SHAPES = {
    "base": _small(),
    # As git-large: patches of 14, and a vision tower wider than the decoder.
    "large": _small({"hidden_size": 80, "image_size": 42, "patch_size": 14}),
    # As the VQA checkpoints: 480 px, 901 image positions.
    "vqa": _small({"image_size": 480, "num_hidden_layers": 1}),
    # Heads of 64, as the real ones have: CUDA picks another attention kernel for them.
    "heads": _small(num_attention_heads=2, hidden_size=128),
    "video": _small(num_image_with_embedding=6, hidden_size=96),  # and heads of 24
}
PREFIXES = {"base": 5, "large": 10, "vqa": 901, "heads": 5, "video": 30}


@torch.no_grad()
def shaken(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with other biases and scales of normalisations: fresh ones are all 0 or 1."""
    random = torch.Generator().manual_seed(2)
    for weight in checkpoint.model.parameters():
        if weight.ndim == 1:
            weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    return checkpoint
