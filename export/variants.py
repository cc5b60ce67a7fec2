"""Faster versions of the fp32 graphs: 8-bit matrix products and an 8-bit K/V cache.

`export.gate` keeps only combinations that agree with PyTorch often enough.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.graphs import Scales, share_weights, with_int8_cache, with_int8_prefix
from export.reference import Arrays, Case, OnnxGraphs, caption
from export.row_scales import with_row_scales
from runtime.model.manifest import Combination, Variant

_PRECISIONS = {"encoder": ("fp32", "int8", "int8-static"), "decoder": ("fp32", "int8")}
_CACHES = {"float32": "", "int8": ".kv8"}  # dtype -> part of the file name
_MATRIX_PRODUCTS = ["MatMul", "Gemm"]
_OPTIONS = {
    "MatMulConstBOnly": True,  # products with weights; products within attention stay fp32
    "DefaultTensorType": 1,  # float32, because shape inference stops at GroupQueryAttention
}


def file_name(graph: str, precision: str, cache: str) -> str:
    """File name of a variant: encoder.onnx is fp32 with a float32 cache, others have suffixes."""
    return f"{graph}{'' if precision == 'fp32' else f'.{precision}'}{_CACHES.get(cache, '')}.onnx"


def files_of(combination: Combination, folder: Path) -> tuple[Path, Path]:
    """Encoder and decoder of a combination."""
    return (
        folder / file_name("encoder", combination.encoder, combination.cache),
        folder / file_name("decoder", combination.decoder, combination.cache),
    )


def data_name(graph: str, precision: str) -> str:
    """File name of a precision's weights, shared by its variants for each cache dtype."""
    return file_name(graph, precision, "float32").replace(".onnx", ".data")


def variant(graph: str, precision: str, cache: str) -> Variant:
    """The manifest's entry for one graph file."""
    return Variant(graph, precision, cache, file_name(graph, precision, cache))


def build_variants(
    checkpoint: Checkpoint, folder: Path, pixels: list[np.ndarray], new_tokens: int
) -> list[Variant]:
    """Write all 8-bit variants, and 8-bit caches for fp32, beside the fp32 graphs of `folder`.

    pixels: uint8 encoder rows to calibrate on. Returns all variants, fp32 graphs included.
    """
    cases = [Case(row, [checkpoint.tokens.bos]) for row in pixels]
    scales = cache_scales(checkpoint, folder, cases, new_tokens)
    with tqdm(total=3, desc="quantising", unit="graph") as progress:
        for graph in _PRECISIONS:
            _quantise_dynamic(folder, graph)
            progress.update()
        _quantise_static(folder, pixels)
        progress.update()
    for precision in _PRECISIONS["encoder"]:
        source, target = (folder / file_name("encoder", precision, c) for c in _CACHES)
        with_int8_prefix(source, target, scales)
    for precision in _PRECISIONS["decoder"]:
        source, target = (folder / file_name("decoder", precision, c) for c in _CACHES)
        with_int8_cache(source, target, checkpoint.sizes, scales)
    return [
        variant(graph, precision, cache)
        for graph, precisions in _PRECISIONS.items()
        for precision in precisions
        for cache in _CACHES
    ]


def cache_scales(
    checkpoint: Checkpoint, folder: Path, cases: list[Case], new_tokens: int
) -> Scales:
    """K/V scale per channel: the largest absolute value, of image and text, maps to 127."""
    sizes = checkpoint.sizes
    largest: Scales = {}

    def note(caches: Arrays, lengths: list[int]) -> None:
        for name, cache in caches.items():
            layer_kind = name.removeprefix("past_key_values.")
            for row, length in zip(cache, lengths, strict=True):
                found = np.abs(row[:, :length]).max(axis=1)
                largest[layer_kind] = np.maximum(largest.get(layer_kind, 0), found)

    graphs = OnnxGraphs(folder / "encoder.onnx", folder / "decoder.onnx")
    answers = caption(graphs, sizes, checkpoint.tokens, cases, new_tokens, note)
    for _ in tqdm(answers, desc="calibrating", total=len(cases), unit="image"):
        pass
    # The lower bound avoids division by zero for a channel that is always zero.
    return {name: np.maximum(value, 1e-6) / 127 for name, value in largest.items()}


def _quantise_dynamic(folder: Path, graph: str) -> None:
    """8-bit weights with a scale per channel; activations with a scale per row, at run time."""
    output = folder / file_name(graph, "int8", "float32")
    quantize_dynamic(
        folder / file_name(graph, "fp32", "float32"),
        output,
        op_types_to_quantize=_MATRIX_PRODUCTS,
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options=_OPTIONS,
    )
    with_row_scales(output)
    share_weights(output, data_name(graph, "int8"))


def _quantise_static(folder: Path, pixels: list[np.ndarray]) -> None:
    """Activation scales fixed by calibration, as OpenVINO requires for 8-bit products."""
    output = folder / file_name("encoder", "int8-static", "float32")
    quantize_static(
        folder / "encoder.onnx",
        output,
        _Rows(pixels),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=_MATRIX_PRODUCTS,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options=_OPTIONS,
    )
    share_weights(output, data_name("encoder", "int8-static"))


class _Rows(CalibrationDataReader):
    def __init__(self, pixels: list[np.ndarray]) -> None:
        self._feeds: Iterator[Arrays] = ({"pixels": row[None]} for row in pixels)

    def get_next(self) -> Arrays | None:
        return next(self._feeds, None)
