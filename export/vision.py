"""The vision tower for GPUs: the same arithmetic as transformers' in fewer passes over memory.

On a GPU, element-wise nodes take longer than the matrix products between them. So the residual sum,
the bias before it and the normalisation after it are one node, attention is another, patches are
embedded by a matrix product, and biases are left out where they have no effect or can be moved, or
are a row of the product's weights.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, linear, pad, scaled_dot_product_attention

_PADDING = 8  # columns, as fp16 products are fast for multiples of 8


class FusedVision(nn.Module):
    """A `GitVisionTransformer` with its weights: pixels to vision features.

    Pixels are integers, which fp16 holds, and stay so: a whole number near the mean is subtracted.
    The rest of their normalisation is in the weights, and in the positions that are added next.
    """

    one: torch.Tensor
    middle: torch.Tensor
    no_bias: torch.Tensor
    nothing: torch.Tensor  # zeros: SkipLayerNormalization of them is faster than LayerNormalization

    @torch.no_grad()
    def __init__(self, tower: Any, rescale: float, mean: list[float], std: list[float]) -> None:
        """rescale, mean, std: of a pixel, 0 to 255, and of each channel of the rescaled ones."""
        super().__init__()
        embeddings = tower.embeddings
        self.patch, self.patches = embeddings.patch_size, embeddings.num_patches
        means, scales = torch.tensor(mean) / rescale, rescale / torch.tensor(std)
        middle = means.round()
        weight = embeddings.patch_embedding.weight * scales.view(1, 3, 1, 1)
        self.embed = nn.Parameter(weight.flatten(1))  # [width, 3 p p]
        self.register_buffer("middle", middle.repeat_interleave(self.patch**2), persistent=False)
        self.first = embeddings.class_embedding
        positions = embeddings.position_embedding.weight[None].clone()  # [1, P, width]
        positions[:, 1:] -= weight.sum((2, 3)) @ (means - middle)
        self.positions = nn.Parameter(positions)
        self.register_buffer("no_bias", torch.zeros_like(self.first), persistent=False)
        self.register_buffer("nothing", torch.zeros_like(positions), persistent=False)
        self.before: nn.LayerNorm = tower.pre_layrnorm
        self.after: nn.LayerNorm = tower.post_layernorm
        self.register_buffer("one", torch.eye(_PADDING)[:1, None], persistent=False)  # 1, 0, 0, ...
        self.layers: Any = nn.ModuleList(_Layer(layer) for layer in tower.encoder.layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 `[N, 3, S, S]` -> `[N, 1 + patches, width]`."""
        # Sizes of reshaped tensors would fix the graph's number of rows.
        side, grid = self.patch, math.isqrt(self.patches)
        patches = images.view(-1, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, self.patches, 3 * side * side).to(self.middle.dtype)
        rows = linear(patches - self.middle, self.embed)
        first = self.first.expand(images.shape[0], 1, -1)
        embedded = torch.cat([first, rows], dim=1)
        hidden, _ = add_and_normalise(embedded, self.positions, self.no_bias, self.before)
        ones = self.one.expand(images.shape[0], 1 + self.patches, -1)
        normal, _ = add_and_normalise(hidden, self.nothing, self.no_bias, self.layers[0].norm1)
        following = [layer.norm1 for layer in self.layers[1:]] + [self.after]
        for layer, norm in zip(self.layers, following, strict=True):
            normal, hidden = layer(normal, hidden, norm, ones)
        return normal


class _Layer(nn.Module):
    """A layer of the tower. It starts after its first normalisation and ends with the next one's.

    A key's bias adds the same number to all scores of a query, which softmax cancels. A value's
    bias passes through attention unchanged, because the weights of a query sum to one, and so
    becomes a part of the output's.
    """

    @torch.no_grad()
    def __init__(self, layer: Any) -> None:
        super().__init__()
        own = layer.self_attn
        self.heads = own.num_heads
        self.norm1, self.norm2 = layer.layer_norm1, layer.layer_norm2
        self.query, self.key, self.value = own.q_proj, own.k_proj.weight, own.v_proj.weight
        self.output = own.out_proj.weight
        self.output_bias = nn.Parameter(own.out_proj.bias + self.output @ own.v_proj.bias)
        self.widened, self.activation, self.narrowed = (
            layer.mlp.fc1, layer.mlp.activation_fn, layer.mlp.fc2
        )  # fmt: skip
        bias = pad(self.widened.bias[:, None], (0, _PADDING - 1))
        self.with_bias = nn.Parameter(torch.cat([self.widened.weight, bias], dim=1))

    def forward(
        self,
        normal: torch.Tensor,
        hidden: torch.Tensor,
        following: nn.LayerNorm,
        ones: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden `[N, P, width]` and its normalisation -> the same after this layer.

        following: the normalisation of the next layer. ones: `[N, P, 8]`, a column of ones and
        others of zeros.
        """
        key, value = linear(normal, self.key), linear(normal, self.value)
        query = with_bias(normal, self.query)
        context = FusedAttention.apply(query, key, value, self.heads)
        attended = linear(context, self.output)
        normal, hidden = add_and_normalise(attended, hidden, self.output_bias, self.norm2)
        weight, bias = self.widened.weight, self.widened.bias
        wide = self.activation(WideProduct.apply(normal, weight, bias, self.with_bias, ones))
        narrow = linear(wide, self.narrowed.weight)
        return add_and_normalise(narrow, hidden, self.narrowed.bias, following)


def add_and_normalise(
    added: torch.Tensor, hidden: torch.Tensor, bias: torch.Tensor, norm: nn.LayerNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised sum of a product, its bias and the residual stream; and that sum."""
    found: tuple[torch.Tensor, torch.Tensor] = SumAndNorm.apply(
        added, hidden, norm.weight, norm.bias, bias, norm.eps
    )
    return found


def with_bias(taken: torch.Tensor, part: nn.Linear) -> torch.Tensor:
    """`part(taken)`. The bias is the second operand of its sum, for which CUDA has a kernel of a
    value per channel; as the first one it takes the general kernel, which is slower.
    """
    return linear(taken, part.weight) + part.bias


class WideProduct(torch.autograd.Function):
    """A linear layer. In ONNX the bias is a row of the weights, which meets a column of ones: a
    node for the sum would take as long as the product. PyTorch's own product adds it for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        taken: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        with_bias: torch.Tensor,
        ones: torch.Tensor,
    ) -> torch.Tensor:
        """`[N, P, K]`, `[W, K]`, `[W]`, both in one `[W, K + 8]`, `[N, P, 8]` -> `[N, P, W]`."""
        return linear(taken, weight, bias)

    @staticmethod
    def symbolic(g: Any, taken: Any, weight: Any, bias: Any, with_bias: Any, ones: Any) -> Any:
        """Two nodes; `weight` and `bias` are unused."""
        longer = g.op("Concat", taken, ones, axis_i=-1)
        product = g.op("MatMul", longer, g.op("Transpose", with_bias, perm_i=[1, 0]))
        product.setType(taken.type().with_sizes([None, None, with_bias.type().sizes()[0]]))
        return product


class SumAndNorm(torch.autograd.Function):
    """Sum and its layer normalisation: one `com.microsoft.SkipLayerNormalization` node in ONNX."""

    @staticmethod
    def forward(
        ctx: Any,
        added: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        shift: torch.Tensor,
        bias: torch.Tensor,
        epsilon: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two `[N, P, W]`, three `[W]` -> normalised sum and sum of added, hidden and bias.

        hidden may be `[1, P, W]`, for all N.
        """
        whole = added + bias + hidden
        return layer_norm(whole, whole.shape[-1:], weight, shift, epsilon), whole

    @staticmethod
    def symbolic(
        g: Any, added: Any, hidden: Any, weight: Any, shift: Any, bias: Any, epsilon: float
    ) -> tuple[Any, Any]:
        """One node; mean and variance, its second and third output, are unused."""
        normal, _, _, whole = g.op(
            "com.microsoft::SkipLayerNormalization",
            added, hidden, weight, shift, bias, epsilon_f=epsilon, outputs=4,
        )  # fmt: skip
        for value in (normal, whole):
            value.setType(added.type())
        return normal, whole


class FusedAttention(torch.autograd.Function):
    """Attention without a mask: one `com.microsoft.MultiHeadAttention` node in ONNX."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
    ) -> torch.Tensor:
        """Three `[B, S, HD]` -> `[B, S, HD]`."""
        split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        context = scaled_dot_product_attention(*split)
        return context.transpose(1, 2).flatten(2)

    @staticmethod
    def symbolic(g: Any, query: Any, key: Any, value: Any, heads: int) -> Any:
        """One node; the operator itself scales by 1/sqrt(D)."""
        context = g.op("com.microsoft::MultiHeadAttention", query, key, value, num_heads_i=heads)
        context.setType(query.type())
        return context
