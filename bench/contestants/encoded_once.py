"""A strong PyTorch baseline: the image encoded once, a static K/V cache, bfloat16, compiled with
frozen weights. It runs the checkpoint's own modules.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch._inductor import config as inductor

from bench.common.settings import SHAPE, TOKENS
from bench.contestants.model import DTYPES
from export.modeling import ImagePrefix, TextDecoder
from export.random_weights import random_weights


class EncodedOnce:
    """Greedy captions of a batch of images, always TOKENS new tokens."""

    def __init__(self, precision: str, compiled: bool) -> None:
        """compiled: use `torch.compile`, which compiles anew for each batch size."""
        checkpoint = random_weights(SHAPE)
        how, dtype = checkpoint.normalisation, DTYPES[precision]
        self._bos, self._sizes = checkpoint.tokens.bos, checkpoint.sizes
        normalised = checkpoint.model, how.rescale, how.mean, how.std
        encoder = ImagePrefix(*normalised, fused=True).to(dtype)  # PyTorch's fused attention
        self._decoder = TextDecoder(checkpoint.model, checkpoint.sizes.prefix).to(dtype)
        inductor.freezing = compiled
        self._encode: Any = torch.compile(encoder) if compiled else encoder
        self._step: Any = torch.compile(self._one_step) if compiled else self._one_step

    @torch.inference_mode()
    def generate(self, pixels: list[np.ndarray]) -> list[list[int]]:
        """New token ids of each image; `pixels` are uint8 `[3, S, S]`."""
        images, sizes = torch.from_numpy(np.stack(pixels)), self._sizes
        prefix = self._encode(images)
        rows, caches = len(pixels), []
        for layer in range(sizes.layers):
            pair = [prefix[f"image.{layer}.{kind}"] for kind in ("key", "value")]
            spare = pair[0].new_zeros(rows, sizes.heads, TOKENS, sizes.head)
            caches.append([torch.cat([part, spare], dim=2) for part in pair])
        ids = torch.full((rows,), self._bos)
        said = []
        for age in range(TOKENS):
            ids = self._step(ids, torch.tensor([age]), caches)
            said.append(ids)
        return torch.stack(said, dim=1).tolist()

    def _one_step(
        self, ids: torch.Tensor, age: torch.Tensor, caches: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Feed each row a token at text position `age` -> next tokens; `caches` grow in place."""
        decoder, place = self._decoder, age + self._sizes.prefix
        hidden = decoder.embeddings(input_ids=ids[:, None], position_ids=age[None])
        seen = (torch.arange(caches[0][0].shape[2]) <= place)[None]
        for layer, qkv, (keys, values) in zip(decoder.layers, decoder.qkv, caches, strict=True):
            heads = (qkv(hidden).view(len(ids), 3, self._sizes.heads, 1, -1)).unbind(1)
            keys.index_copy_(2, place, heads[1])
            values.index_copy_(2, place, heads[2])
            context = nn.functional.scaled_dot_product_attention(
                heads[0], keys, values, attn_mask=seen
            )
            context = context.transpose(1, 2).flatten(2)
            hidden = layer.feed_forward_chunk(layer.attention.output(context, hidden))
        return decoder.head(hidden[:, 0]).argmax(dim=-1)
