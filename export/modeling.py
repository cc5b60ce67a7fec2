"""GIT as two modules: the image prefix, and a decoder of one text token at a time.

In GIT's decoder, image tokens attend to image tokens only, so their keys and values depend on the
image alone. `ImagePrefix` computes these once; `TextDecoder` reads them from its K/V cache as if
they were the beginning of the text. Both call the checkpoint's own modules
(`transformers.models.git.modeling_git`), so that each weight keeps its one meaning.
"""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import GitForCausalLM
from transformers.models.git.modeling_git import GitLayer

KeyValue = tuple[torch.Tensor, torch.Tensor]


class ImagePrefix(nn.Module):
    """Pixels to the image's keys and values in each decoder layer."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: GitForCausalLM, rescale: float, mean: list[float], std: list[float]
    ) -> None:
        """rescale, mean, std: of a pixel, 0 to 255, and of each channel of the rescaled ones."""
        super().__init__()
        self.config = model.config
        self.git = model.git
        self.layers: Any = nn.ModuleList(_without_shifts(each) for each in model.git.encoder.layer)
        self.rescale = rescale
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 `[B, 3, S, S]`, or `[B, F, 3, S, S]` -> `image.{i}.key/value`, `[B, H, P, D]`."""
        hidden = self._projected(self._features(pixels))
        prefix: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            attention = layer.attention.self
            key, value = attention.key(hidden), attention.value(hidden)
            for kind, each in (("key", key), ("value", value)):
                split = each.unflatten(-1, (attention.num_attention_heads, -1))
                prefix[f"image.{index}.{kind}"] = self._placed(split)
            if index + 1 == len(self.layers):
                break  # the last layer's output is unused
            hidden = self._output(layer, hidden, key, value)
        return prefix

    def _placed(self, split: torch.Tensor) -> torch.Tensor:
        """Keys or values `[B, P, H, D]`, as the graph's output."""
        return split.transpose(1, 2).contiguous()

    def _output(
        self, layer: GitLayer, hidden: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Output of a layer, which computes its keys and values itself."""
        output: torch.Tensor = layer(hidden)[0]
        return output

    def _projected(self, features: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.git.visual_projection(features)
        return projected

    def _encoded(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images uint8 `[N, 3, S, S]`."""
        images = (images.to(self.mean.dtype) * self.rescale - self.mean) / self.std
        encoded: torch.Tensor = self.git.image_encoder(images).last_hidden_state
        return encoded

    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Vision features of all frames of an image, `[B, P, vision width]`."""
        # Sizes come from the configuration: sizes of a traced tensor would fix the graph's number
        # of rows.
        frames = self.config.num_image_with_embedding
        features = self._encoded(pixels.flatten(0, 1) if frames else pixels)
        if not frames:
            return features
        # One vision call for all frames, then each frame's own embedding, then one long prefix.
        vision = self.git.image_encoder.vision_model.embeddings
        temporal = torch.stack([e[0] for e in self.git.img_temporal_embedding])  # [F, 1, width]
        features = features.view(-1, frames, vision.num_positions, vision.embed_dim) + temporal
        return features.view(-1, frames * vision.num_positions, vision.embed_dim)


class TextDecoder(nn.Module):
    """One token per row, over a K/V cache of fixed capacity; rows may differ in length."""

    def __init__(self, model: GitForCausalLM, prefix: int) -> None:
        super().__init__()
        self.config = model.config
        self.prefix = prefix
        self.embeddings = model.git.embeddings
        self.layers: Any = nn.ModuleList(_without_shifts(each) for each in model.git.encoder.layer)
        self.head = model.output
        self.qkv = nn.ModuleList(_packed_projection(layer) for layer in self.layers)

    def forward(
        self,
        token_ids: torch.Tensor,
        lengths: torch.Tensor,
        total_length: torch.Tensor,
        candidates: torch.Tensor,
        past_key_values: list[KeyValue],
    ) -> dict[str, Any]:
        """Shapes as in ARCHITECTURE.md, "Graphs"; `past_key_values`: L pairs of `[B, H, C, D]`.

        Returns the `candidates` (K) likeliest tokens, best first: `candidate_ids` int64 `[B, K]`
        and `candidate_logprobs` float `[B, K]`, NaN where a row's computation failed; `best_logits`
        float `[B, 1]`, the first token's logit, from which the others follow; all `logits` float
        `[B, V]`; and `past_key_values`, L new pairs.
        """
        positions = (lengths - self.prefix).to(torch.int64).unsqueeze(1)
        hidden = self.embeddings(input_ids=token_ids, position_ids=positions)
        present: list[KeyValue] = []
        for layer, qkv, past in zip(self.layers, self.qkv, past_key_values, strict=True):
            heads = layer.attention.self.num_attention_heads
            context, key, value = CachedAttention.apply(
                qkv(hidden), *past, lengths, total_length, heads
            )
            present.append((key, value))
            hidden = layer.feed_forward_chunk(layer.attention.output(context, hidden))
        logits = self.head(hidden[:, 0])
        # One NaN among the logits makes all log-probabilities of the row NaN.
        logprobs, ids = Likeliest.apply(logits.log_softmax(dim=-1), candidates)
        return {
            "candidate_ids": ids,
            "candidate_logprobs": logprobs,
            "best_logits": logits.amax(dim=-1, keepdim=True),
            "logits": logits,
            "past_key_values": present,
        }


class Likeliest(torch.autograd.Function):
    """TopK with the count as a tensor: the largest values of each row and their indices."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, count: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float `[B, V]`, int64 `[1]` -> float and int64 `[B, count]`, the largest first."""
        found = values.topk(int(count), dim=-1)
        return found.values, found.indices

    @staticmethod
    def symbolic(g: Any, values: Any, count: Any) -> tuple[Any, Any]:
        """A TopK node; torch's own export of topk would fix the count."""
        largest, places = g.op("TopK", values, count, axis_i=-1, outputs=2)
        largest.setType(values.type().with_sizes([None, None]))
        places.setType(torch._C.TensorType.get().with_dtype(torch.int64).with_sizes([None, None]))
        return largest, places


class CachedAttention(torch.autograd.Function):
    """Append one token's key and value to a cache of fixed capacity; attend over the cache.

    In ONNX this is one `com.microsoft.GroupQueryAttention` node, which writes the new key and value
    into the cache in place when past and present are bound to one buffer. `forward` is the PyTorch
    equivalent. Positions beyond a row's length are undefined in both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        lengths: torch.Tensor,
        total_length: torch.Tensor,
        heads: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[B, 1, 3HD]`, two `[B, H, C, D]`, int32 `[B]`, `[1]` -> `[B, 1, HD]`, both caches."""
        rows, _, width = qkv.shape
        head_size = width // (3 * heads)
        query, key, value = qkv.view(rows, 3, heads, head_size).unbind(1)
        present_key, present_value = past_key.clone(), past_value.clone()
        row = torch.arange(rows, device=qkv.device)
        present_key[row, :, lengths.long()] = key
        present_value[row, :, lengths.long()] = value
        scores = torch.einsum("bhd,bhcd->bhc", query, present_key) / math.sqrt(head_size)
        unseen = torch.arange(past_key.shape[2], device=qkv.device) > lengths[:, None]
        scores = scores.masked_fill(unseen[:, None], float("-inf"))
        context = torch.einsum("bhc,bhcd->bhd", scores.softmax(dim=-1), present_value)
        return context.reshape(rows, 1, heads * head_size), present_key, present_value

    @staticmethod
    def symbolic(
        g: Any,
        qkv: Any,
        past_key: Any,
        past_value: Any,
        lengths: Any,
        total_length: Any,
        heads: int,
    ) -> tuple[Any, Any, Any]:
        """One node; its `seqlens_k` is the last token's index, which equals `lengths`."""
        absent = g.op("prim::Constant")
        absent.setType(torch.OptionalType.ofTensor())
        context, key, value = g.op(
            "com.microsoft::GroupQueryAttention",
            qkv, absent, absent, past_key, past_value, lengths, total_length,
            num_heads_i=heads, kv_num_heads_i=heads, outputs=3,
        )  # fmt: skip
        _, _, _, head_size = past_key.type().varyingSizes()
        context.setType(qkv.type().with_sizes([None, 1, heads * head_size]))
        key.setType(past_key.type())
        value.setType(past_value.type())
        return context, key, value


@torch.no_grad()
def _without_shifts(layer: GitLayer) -> GitLayer:
    """A copy of a layer that says the same, but whose keys and values have no bias, for the reasons
    in `export.vision`. Images and text share a cache, so both graphs leave it out.
    """
    own = copy.deepcopy(layer)
    attention, output = own.attention.self, own.attention.output.dense
    output.bias += output.weight @ attention.value.bias
    attention.key.bias = attention.value.bias = None
    return own


def _packed_projection(layer: GitLayer) -> nn.Linear:
    """Query, key and value projections as one: a large product is faster than three small ones."""
    parts = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
    width = parts[0].in_features
    packed = nn.Linear(width, 3 * width).to(parts[0].weight.dtype)
    packed.weight.data = torch.cat([part.weight.data for part in parts])
    packed.bias.data = pad(parts[0].bias.data, (0, 2 * width))  # keys and values have none
    return packed
