"""Optimum configurations of GIT's two graphs: names, dynamic axes and dummy inputs.

Optimum has none for GIT; pass these to
`onnx_export_from_model(custom_onnx_configs=..., fn_get_submodels=...)`.
"""

from typing import Any

import torch
from optimum.exporters.onnx.base import OnnxConfig, OnnxConfigWithPast
from optimum.utils.normalized_config import NormalizedTextConfig
from transformers import GitConfig

from runtime.model.manifest import Sizes, kv_names

Axes = dict[str, dict[int, str]]

OPSET = 17
_ROWS = "rows"
_CAPACITY = "capacity"
_CANDIDATES = "candidates"
_DUMMY_ROWS = 2
_DUMMY_CANDIDATES = 3
_DUMMY_SPARE = 8  # text positions of a dummy slot


def _pixels(sizes: Sizes) -> torch.Tensor:
    frames = () if sizes.frames is None else (sizes.frames,)
    shape = (_DUMMY_ROWS, *frames, 3, sizes.image, sizes.image)
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def _decoder_inputs(sizes: Sizes) -> dict[str, Any]:
    """Arguments of `TextDecoder.forward` by name, for rows of different lengths."""
    lengths = sizes.prefix + torch.tensor([3, 0], dtype=torch.int32)
    cache = (_DUMMY_ROWS, sizes.heads, sizes.prefix + _DUMMY_SPARE, sizes.head)
    return {
        "token_ids": torch.randint(0, sizes.vocabulary, (_DUMMY_ROWS, 1)),
        "lengths": lengths,
        "total_length": lengths.max().view(1) + 1,
        "candidates": torch.tensor([_DUMMY_CANDIDATES]),
        "past_key_values": [(torch.randn(cache), torch.randn(cache)) for _ in range(sizes.layers)],
    }


class GitEncoderOnnxConfig(OnnxConfig):
    """`encoder.onnx`: pixels to image keys and values."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = OPSET

    def __init__(self, config: GitConfig, sizes: Sizes, task: str) -> None:
        super().__init__(config, task=task)
        self._sizes = sizes

    @property
    def inputs(self) -> Axes:
        """uint8 pixels; only the number of rows varies."""
        return {"pixels": {0: _ROWS}}

    @property
    def outputs(self) -> Axes:
        """A key and a value output per decoder layer."""
        return {f"image.{name}": {0: _ROWS} for name in kv_names(self._sizes.layers)}

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Random pixels; Optimum's shape arguments do not cover this model's inputs."""
        pixels = _pixels(self._sizes)
        return {"pixels": pixels.numpy() if framework == "np" else pixels}


class GitDecoderOnnxConfig(OnnxConfigWithPast):
    """`decoder.onnx`: one token per row, with the K/V cache as input and output."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = OPSET

    def __init__(self, config: GitConfig, sizes: Sizes, task: str) -> None:
        super().__init__(config, task=task, use_past=True, use_past_in_inputs=True)
        self._sizes = sizes

    @property
    def inputs(self) -> Axes:
        """Token, length and K/V cache of each row; total length and number of candidates."""
        return {
            "token_ids": {0: _ROWS},
            "lengths": {0: _ROWS},
            "total_length": {},
            "candidates": {},
            **self._caches("past_key_values"),
        }

    @property
    def outputs(self) -> Axes:
        """The likeliest tokens, all logits, and the updated K/V cache."""
        likeliest = {0: _ROWS, 1: _CANDIDATES}
        return {
            "candidate_ids": likeliest,
            "candidate_logprobs": likeliest,
            "best_logits": {0: _ROWS},
            "logits": {0: _ROWS},
            **self._caches("present"),
        }

    def _caches(self, name: str) -> Axes:
        names = kv_names(self._sizes.layers)
        return {f"{name}.{each}": {0: _ROWS, 2: _CAPACITY} for each in names}

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Random tokens and caches; Optimum's shape arguments do not apply."""
        return _decoder_inputs(self._sizes)
