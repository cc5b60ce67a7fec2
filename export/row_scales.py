"""8-bit matrix products with one activation scale per row, so that rows do not affect each other.

ONNX Runtime's dynamic quantisation uses one scale for a whole tensor: the result of an image or a
sequence then depends on the rest of its batch. Here each row x (one position of one image) is
quantised by its own largest value: `q = round(x / s) + 128` with `s = max|x| / 127`. The product
with the weights is then scaled by s and by the scale of each weight channel.

Activations are uint8 around 128 because the CPU provider's int8-by-int8 product takes about fifteen
times as long (x86, VNNI). MatMulIntegerToFloat is emitted here with the channel scales only: fused
by ONNX Runtime's optimiser, it would use the first row's scale for all rows.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

_STEP, _LEAST, _UNIT, _MIDDLE = "row.step", "row.least", "row.unit", "row.middle"
_CONSTANTS: dict[str, np.ndarray] = {
    _STEP: np.array(1 / 127, np.float32),
    _LEAST: np.array(1e-12, np.float32),  # avoids division by zero
    _UNIT: np.array(1, np.float32),
    _MIDDLE: np.array(128, np.uint8),
}


def with_row_scales(path: Path) -> None:
    """Rewrite the products of a graph from `onnxruntime.quantization.quantize_dynamic`."""
    model = onnx.load(path)
    graph = model.graph
    for name, value in _CONSTANTS.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    nodes = _rewritten(model)
    del graph.node[:]
    graph.node.extend(nodes)
    if all(opset.domain != "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save_model(model, path)


def _rewritten(model: ModelProto) -> list[NodeProto]:
    """All nodes, with per-row scales in place of per-tensor scales."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: dict[str, list[NodeProto]] = {n.output[0]: [n] for n in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            nodes[node.output[0]] = _quantised(node)
        elif node.op_type == "MatMulInteger":
            # MatMulInteger, Cast to float, Mul by the product of both scales
            [cast] = readers[node.output[0]]
            [scaled] = readers[cast.output[0]]
            [both] = [made_by[name] for name in scaled.input if name != cast.output[0]]
            row_scale = made_by[node.input[0]].output[1]
            [channel_scale] = [name for name in both.input if name != row_scale]
            for replaced in (node, cast, both):
                nodes[replaced.output[0]] = []
            nodes[scaled.output[0]] = _product(node, row_scale, channel_scale, scaled.output[0])
    return [node for made in nodes.values() for node in made]


def _quantised(node: NodeProto) -> list[NodeProto]:
    """Nodes that map float32 `[..., K]` to uint8 of the same shape and scales `[..., 1]`."""
    [values] = node.input
    quantised, scale, _ = node.output
    size, largest, least, units = (f"{scale}.{part}" for part in ("size", "max", "least", "units"))
    return [
        helper.make_node("Abs", [values], [size]),
        helper.make_node("ReduceMax", [size], [largest], axes=[-1], keepdims=1),
        helper.make_node("Max", [largest, _LEAST], [least]),
        helper.make_node("Mul", [least, _STEP], [scale]),
        helper.make_node("Div", [values, scale], [units]),
        helper.make_node("QuantizeLinear", [units, _UNIT, _MIDDLE], [quantised]),
    ]


def _product(node: NodeProto, row_scale: str, channel_scale: str, output: str) -> list[NodeProto]:
    quantised, weights, _, zero_point = node.input
    product = f"{output}.channels"
    return [
        helper.make_node(
            "MatMulIntegerToFloat",
            [quantised, weights, _UNIT, channel_scale, _MIDDLE, zero_point],
            [product],
            domain="com.microsoft",
        ),
        helper.make_node("Mul", [product, row_scale], [output]),
    ]
