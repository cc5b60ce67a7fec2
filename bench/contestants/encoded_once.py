"""A strong PyTorch baseline: the image encoded once, a static K/V cache, compiled
(on a processor with frozen weights, on a GPU with CUDA graphs). It runs the checkpoint's own
modules.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._inductor import config as inductor

from bench.common.settings import SHAPE, TOKENS
from bench.contestants.model import DTYPES
from export.fused_prefix import FusedImagePrefix
from export.modeling import TextDecoder
from export.random_weights import random_weights


class EncodedOnce:
    """Greedy captions of a batch of images, always TOKENS new tokens."""

    def __init__(self, precision: str, compiled: bool, device: str = "cpu") -> None:
        """compiled: use `torch.compile`, which compiles anew for each batch size."""
        checkpoint = random_weights(SHAPE)
        how, dtype = checkpoint.normalisation, DTYPES[precision]
        self._bos, self._sizes, self._device = checkpoint.tokens.bos, checkpoint.sizes, device
        normalised = checkpoint.model, how.rescale, how.mean, how.std
        # With PyTorch's fused attention.
        encoder = FusedImagePrefix(*normalised).to(device, dtype)
        decoder = TextDecoder(checkpoint.model, checkpoint.sizes.prefix)
        self._decoder = decoder.to(device, dtype)
        self._ages = torch.arange(TOKENS, device=device)
        self._caches: dict[int, list[list[torch.Tensor]]] = {}
        on_gpu = device != "cpu"
        inductor.freezing = compiled and not on_gpu
        mode = "reduce-overhead" if on_gpu else "default"  # which captures CUDA graphs
        compile_ = partial(torch.compile, mode=mode, dynamic=False) if compiled else _as_it_is
        self._encode: Any = compile_(encoder)
        self._step: Any = compile_(self._one_step)

    @torch.inference_mode()
    def generate(self, pixels: list[np.ndarray]) -> list[list[int]]:
        """New token ids of each image; `pixels` are uint8 `[3, S, S]`."""
        rows, positions = len(pixels), self._sizes.prefix
        prefix = self._encode(torch.from_numpy(np.stack(pixels)).to(self._device))
        caches = self._caches.get(rows) or self._new_caches(rows, prefix["image.0.key"])
        for layer, pair in enumerate(caches):
            for cache, kind in zip(pair, ("key", "value"), strict=True):
                cache[:, :, :positions] = prefix[f"image.{layer}.{kind}"].transpose(1, 2)
        ids = torch.full((rows,), self._bos, device=self._device)
        said = []
        for age in self._ages.split(1):
            ids = self._step(ids, age, caches).clone()  # a CUDA graph's next replay overwrites it
            said.append(ids)
        return torch.stack(said, dim=1).tolist()

    def _new_caches(self, rows: int, like: torch.Tensor) -> list[list[torch.Tensor]]:
        """Keys and values of each layer, for all captions of `rows` images."""
        shape = rows, self._sizes.heads, self._sizes.prefix + TOKENS, self._sizes.head
        caches = [[like.new_zeros(shape) for _ in range(2)] for _ in range(self._sizes.layers)]
        for pair in caches:
            for cache in pair:
                torch._dynamo.mark_static_address(cache)  # else no CUDA graph may write to it
        self._caches[rows] = caches
        return caches

    def _one_step(
        self, ids: torch.Tensor, age: torch.Tensor, caches: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Feed each row a token at text position `age` -> next tokens; `caches` grow in place."""
        decoder, place = self._decoder, age + self._sizes.prefix
        hidden = decoder.embeddings(input_ids=ids[:, None], position_ids=age[None])
        seen = (torch.arange(caches[0][0].shape[2], device=ids.device) <= place)[None]
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


def _as_it_is(function: Any) -> Any:
    return function
