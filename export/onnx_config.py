"""GIT's two graphs as Optimum sees them: names, dynamic axes and dummy inputs.

Optimum has no configuration for GIT; `graphs` gives it one for each submodel, to be passed to
`onnx_export_from_model(custom_onnx_configs=..., fn_get_submodels=...)`.
"""

from typing import Any

import torch
from optimum.exporters.onnx.base import OnnxConfig, OnnxConfigWithPast
from optimum.utils import DummyInputGenerator
from optimum.utils.normalized_config import NormalizedTextConfig
from transformers import GitConfig

from runtime.manifest import Sizes

Axes = dict[str, dict[int, str]]

OPSET = 17
_ROWS = "rows"
_CAPACITY = "capacity"


class _GitInputs(DummyInputGenerator):
    """Inputs of both graphs, with rows of unequal age in the decoder's."""

    SUPPORTED_INPUT_NAMES = ("pixels", "token_ids", "lengths", "total_length", "past_key_values")
    rows = 2
    spare = 8  # positions that a slot has beyond the image prefix

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def generate(
        self,
        input_name: str,
        framework: str = "pt",
        int_dtype: str = "int64",
        float_dtype: str = "fp32",
    ) -> Any:
        """A tensor for `input_name`, or the list of K/V pairs; always PyTorch."""
        sizes = self._sizes
        if input_name == "pixels":
            frames = () if sizes.frames is None else (sizes.frames,)
            shape = (self.rows, *frames, 3, sizes.image, sizes.image)
            return torch.randint(0, 256, shape, dtype=torch.uint8)
        if input_name == "token_ids":
            return torch.randint(0, sizes.vocabulary, (self.rows, 1))
        ages = torch.tensor([sizes.prefix + 3, sizes.prefix], dtype=torch.int32)
        if input_name == "lengths":
            return ages
        if input_name == "total_length":
            return ages.max().view(1) + 1
        cache = (self.rows, sizes.heads, sizes.prefix + self.spare, sizes.head)
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[float_dtype]
        return [
            (torch.randn(cache, dtype=dtype), torch.randn(cache, dtype=dtype))
            for _ in range(sizes.layers)
        ]


class GitEncoderOnnxConfig(OnnxConfig):
    """`encoder.onnx`: pixels to image keys and values."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = OPSET
    ATOL_FOR_VALIDATION = 1e-3

    def __init__(self, config: GitConfig, sizes: Sizes, task: str) -> None:
        super().__init__(config, task=task)
        self._sizes = sizes

    @property
    def inputs(self) -> Axes:
        """uint8 pixels; only the number of rows varies."""
        return {"pixels": {0: _ROWS}}

    @property
    def outputs(self) -> Axes:
        """A key and a value for each decoder layer, each an output of its own."""
        return {
            f"image.{layer}.{kind}": {0: _ROWS}
            for layer in range(self._sizes.layers)
            for kind in ("key", "value")
        }

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Random pixels; Optimum's shape arguments know nothing of this model's inputs."""
        return {"pixels": _GitInputs(self._sizes).generate("pixels")}


class GitDecoderOnnxConfig(OnnxConfigWithPast):
    """`decoder.onnx`: one token a row, with the cache as input and output."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DEFAULT_ONNX_OPSET = OPSET
    ATOL_FOR_VALIDATION = 1e-3

    def __init__(self, config: GitConfig, sizes: Sizes, task: str) -> None:
        super().__init__(config, task=task, use_past=True, use_past_in_inputs=True)
        self._sizes = sizes

    @property
    def inputs(self) -> Axes:
        """Token, age and cache of each row."""
        return {
            "token_ids": {0: _ROWS},
            "lengths": {0: _ROWS},
            "total_length": {},
            **self._caches("past_key_values"),
        }

    @property
    def outputs(self) -> Axes:
        """The most likely token, what it was chosen from, and the grown cache."""
        return {"next_ids": {0: _ROWS}, "logits": {0: _ROWS}, **self._caches("present")}

    def _caches(self, name: str) -> Axes:
        return {
            f"{name}.{layer}.{kind}": {0: _ROWS, 2: _CAPACITY}
            for layer in range(self._sizes.layers)
            for kind in ("key", "value")
        }

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Inputs by the names of `TextDecoder.forward`: the cache is one argument there."""
        inputs = _GitInputs(self._sizes)
        names = ("token_ids", "lengths", "total_length", "past_key_values")
        return {name: inputs.generate(name) for name in names}
