"""fp16 versions of the graphs, for GPUs. Nodes with values near the end of fp16's range stay fp32.

The largest fp16 value is 65,504. The range of every tensor is measured on the calibration pictures,
because an overflowing graph goes wrong on some pictures only.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from tqdm import tqdm

from export.checkpoint import Checkpoint
from export.device_graphs import write_candidates, write_insertion, write_reordering
from export.graphs import (
    drop_statistics,
    drop_unused_sums,
    for_bursts,
    share_weights,
)
from export.reference import Arrays, Case, caption
from export.search_graph import write_search
from export.variants import data_name, file_name, variant
from runtime.model.manifest import HELPERS, Variant

FUSED = "fp16-fused"  # each attention as one node, for CUDA; plain fp16 is for TensorRT
_CACHE = "float16"
_LIMIT = 65_504 / 4  # margin for pictures that were not measured
_MEASURED = 16  # pictures: every tensor is measured on each
_ALWAYS_HALF = {"GroupQueryAttention"}  # it has no fp32 kernel on CUDA

Largest = dict[str, float]  # tensor -> largest absolute value seen


def build_fp16(
    checkpoint: Checkpoint, folder: Path, fused: Path, cases: list[Case], tokens: int, plain: bool
) -> tuple[list[Variant], dict[str, list[str]]]:
    """Write the fp16 variants beside the fp32 graphs of `folder`.

    cases: the first _MEASURED are captioned to measure ranges. fused: an fp32 encoder with nodes
    for CUDA, deleted afterwards. plain: also write an encoder in plain ONNX, for TensorRT.
    Returns the variants, and per file the nodes left in fp32.
    """
    drop_statistics(fused)
    cases = cases[:_MEASURED]
    decoder = folder / "decoder.onnx"
    encoders = {FUSED: fused} | ({"fp16": folder / "encoder.onnx"} if plain else {})
    kept: dict[str, list[str]] = {}
    for precision, encoder in encoders.items():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            graphs = MeasuredGraphs(encoder, decoder, Path(scratch))
            answers = caption(graphs, checkpoint.sizes, checkpoint.tokens, cases, tokens)
            for _ in tqdm(answers, desc="measuring ranges", total=len(cases), unit="image"):
                pass
        files = [("encoder", precision, encoder, graphs.encoder)]
        if precision == FUSED:
            files.append(("decoder", "fp16", decoder, graphs.decoder))
        for graph, half, source, measured in files:
            output = folder / file_name(graph, half, _CACHE)
            kept[output.name] = _convert(source, output, measured.largest)
            if graph == "decoder":
                for_bursts(output)
            share_weights(output, data_name(graph, half))
    fused.unlink()
    sizes = checkpoint.sizes
    write_insertion(folder / file_name("insert", "fp16", _CACHE))
    write_reordering(folder / file_name("reorder", "fp16", _CACHE))
    write_candidates(folder / file_name("candidates", "fp16", _CACHE))
    write_search(folder / file_name("search", "fp16", _CACHE), sizes)
    made = [variant("encoder", precision, _CACHE) for precision in encoders]
    made += [variant(graph, "fp16", _CACHE) for graph in ("decoder", *HELPERS)]
    return made, kept


class _Measured:
    """A graph with all tensors as outputs; records the largest absolute value of each."""

    def __init__(self, graph: Path, scratch: Path) -> None:
        model = onnx.load(graph)
        known = {value.name for value in model.graph.output}
        inner = [name for node in model.graph.node for name in node.output if name]
        # ONNX Runtime infers the types.
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in inner if name not in known
        )
        shown = scratch / graph.name
        onnx.save_model(model, shown, save_as_external_data=True, location=f"{graph.name}.data")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(shown, options, providers=["CPUExecutionProvider"])
        self._known = known
        self.largest: Largest = {}

    def run(self, feeds: Arrays) -> Arrays:
        """Run the graph; returns its original outputs."""
        names = [output.name for output in self._session.get_outputs()]
        made = dict(zip(names, self._session.run(names, feeds), strict=True))
        for name, value in made.items():
            if value.dtype == np.float32 and value.size:
                seen = float(np.abs(value).max())
                self.largest[name] = max(self.largest.get(name, 0.0), seen)
        return {name: made[name] for name in self._known}


class MeasuredGraphs:
    """Both fp32 graphs, recording the range of each tensor."""

    def __init__(self, encoder: Path, decoder: Path, scratch: Path) -> None:
        self.encoder, self.decoder = (_Measured(graph, scratch) for graph in (encoder, decoder))

    def encode(self, pixels: np.ndarray) -> Arrays:
        """See `reference.Graphs`; one image at a time, because all tensors are kept in memory."""
        rows = [self.encoder.run({"pixels": row[None]}) for row in pixels]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def decode(self, feeds: Arrays) -> Arrays:
        """See `reference.Graphs`; caches are not recorded, as they hold undefined positions."""
        made = self.decoder.run(feeds)
        for name in made:
            if name.startswith("present."):
                self.decoder.largest.pop(name, None)
        return made


def _squares_overflow(node: NodeProto, largest: Largest, widths: dict[str, int]) -> bool:
    """Whether a mean of squares, which CUDA's SkipLayerNormalization computes in fp16, may overflow
    for a single large value.
    """
    if node.op_type != "SkipLayerNormalization":
        return False
    return largest.get(node.output[3], 0.0) ** 2 / widths.get(node.input[2], 1) > _LIMIT


def _convert(source: Path, output: Path, largest: Largest) -> list[str]:
    """Write the fp16 version of a graph; returns the names of the nodes that stay in fp32."""
    model = onnx.load(source)
    hot = {name for name, value in largest.items() if value > _LIMIT}
    widths = {value.name: value.dims[0] for value in model.graph.initializer if value.dims}
    kept = [
        node.name
        for node in model.graph.node
        if (hot & {*node.input, *node.output} and node.op_type not in _ALWAYS_HALF)
        or _squares_overflow(node, largest, widths)
    ]
    drop_unused_sums(model.graph)
    # The converter needs types to insert casts, and shape inference stops at contrib nodes.
    own = {value.name for value in (*model.graph.input, *model.graph.output)}
    del model.graph.value_info[:]
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in {*largest} - own
    )
    half = convert_float_to_float16(
        model, keep_io_types=False, disable_shape_infer=True, node_block_list=kept
    )
    onnx.save_model(half, output)
    return kept
