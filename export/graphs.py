"""Changes to exported graphs, made on the ONNX files themselves."""

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from runtime.manifest import Sizes

Scales = dict[str, np.ndarray]  # "{layer}.key" or "{layer}.value" -> float32 [H, D]


def share_weights(graph: Path, data: str) -> None:
    """Move a graph's weights to the file `data` beside it, where other graphs can use them too."""
    model = onnx.load(graph)
    graph.unlink()
    (graph.parent / data).unlink(missing_ok=True)
    onnx.save_model(model, graph, save_as_external_data=True, location=data, size_threshold=1024)


def with_int8_prefix(encoder: Path, output: Path, scales: Scales) -> None:
    """The encoder, emitting int8 K/V: `round(x / scale)` a channel. Weights stay where they are."""
    model = onnx.load(encoder, load_external_data=False)
    graph = model.graph
    zero, one = "cache.zero_point", "cache.unit_scale"
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), zero))
    graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), one))
    for value in graph.output:
        name, layer_kind = value.name, value.name.removeprefix("image.")
        _rename_output(graph, name, f"{name}.float")
        # A scale for each channel of each head; QuantizeLinear knows a single axis only.
        inverse = (1 / scales[layer_kind]).astype(np.float32)[None, :, None, :]
        graph.initializer.append(numpy_helper.from_array(inverse, f"{name}.inverse_scale"))
        graph.node.extend(
            [
                helper.make_node(
                    "Mul", [f"{name}.float", f"{name}.inverse_scale"], [f"{name}.unit"]
                ),
                helper.make_node("QuantizeLinear", [f"{name}.unit", one, zero], [name]),
            ]
        )
        value.type.tensor_type.elem_type = TensorProto.INT8
    onnx.save_model(model, output)


def with_int8_cache(decoder: Path, output: Path, sizes: Sizes, scales: Scales) -> None:
    """The decoder over an int8 cache, for which GroupQueryAttention takes a scale a channel."""
    model = onnx.load(decoder, load_external_data=False)
    graph = model.graph
    attention = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attention) == sizes.layers
    for layer, node in enumerate(attention):
        names = []
        for kind in ("key", "value"):
            names.append(f"cache.{layer}.{kind}.scale")
            flat = scales[f"{layer}.{kind}"].astype(np.float32).reshape(-1)
            graph.initializer.append(numpy_helper.from_array(flat, names[-1]))
        _quantise_cache(node, *names)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    del graph.value_info[:]  # it tells the old type
    onnx.save_model(model, output)


_FIRST_SCALE = 12  # GroupQueryAttention's inputs 12 and 13: k_scale, v_scale


def _quantise_cache(node: NodeProto, key_scale: str, value_scale: str) -> None:
    absent = [""] * (_FIRST_SCALE - len(node.input))
    node.input.extend([*absent, key_scale, value_scale])
    settings = {
        "kv_cache_bit_width": 8,
        "k_quant_type": "PER_CHANNEL",
        "v_quant_type": "PER_CHANNEL",
    }
    node.attribute.extend(helper.make_attribute(*setting) for setting in settings.items())


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
