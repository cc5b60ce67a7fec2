"""The image prefix for GPUs, of nodes for which CUDA has kernels; see `export.vision`."""

from typing import Any

import torch
from torch.nn.functional import linear
from transformers import GitForCausalLM
from transformers.models.git.modeling_git import GitLayer

from export.modeling import ImagePrefix
from export.vision import FusedAttention, FusedVision, add_and_normalise, with_bias


class FusedImagePrefix(ImagePrefix):
    """Pixels to the image's keys and values, `[B, P, H, D]`: they are copied on the device anyway.

    Attention is one node, and each sum with its normalisation another.
    """

    nothing: torch.Tensor  # zeros, as in FusedVision, in the projection's shape

    def __init__(
        self, model: GitForCausalLM, rescale: float, mean: list[float], std: list[float]
    ) -> None:
        super().__init__(model, rescale, mean, std)
        tower = model.git.image_encoder.vision_model
        self.vision = FusedVision(tower, rescale, mean, std)
        prefix = tower.embeddings.num_positions * (model.config.num_image_with_embedding or 1)
        nothing = torch.zeros(1, prefix, model.config.hidden_size)
        self.register_buffer("nothing", nothing, persistent=False)

    def _encoded(self, images: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.vision(images)
        return encoded

    def _projected(self, features: torch.Tensor) -> torch.Tensor:
        product, norm = self.git.visual_projection.visual_projection
        projected = linear(features, product.weight)
        return add_and_normalise(projected, self.nothing, product.bias, norm)[0]

    def _placed(self, split: torch.Tensor) -> torch.Tensor:
        return split

    def _output(
        self, layer: GitLayer, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        own = layer.attention.self
        query = with_bias(hidden, own.query)
        context = FusedAttention.apply(query, key, value, own.num_attention_heads)
        attended = _add_product(layer.attention.output, context, hidden)
        return _add_product(layer.output, layer.intermediate(attended), attended)


def _add_product(output: Any, taken: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`output(taken, hidden)` of a layer's part: product, sum and normalisation."""
    added = linear(taken, output.dense.weight)
    return add_and_normalise(added, hidden, output.dense.bias, output.LayerNorm)[0]
