"""Changes to exported graphs, made on the ONNX files themselves."""

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from runtime.manifest import Sizes

_OPSET, _IR_VERSION = 17, 8  # what the exporter writes too
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


def with_next_lengths(decoder: Path) -> None:
    """Let the decoder also emit `next_lengths`, so that steps can follow one another on a device.

    `lengths` is what GroupQueryAttention counts the cache by; each step adds one to it.
    """
    model = onnx.load(decoder, load_external_data=False)
    one = "next_lengths.one"
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.int32), one))
    model.graph.node.append(helper.make_node("Add", ["lengths", one], ["next_lengths"]))
    model.graph.output.append(
        helper.make_tensor_value_info("next_lengths", TensorProto.INT32, ["rows"])
    )
    onnx.save_model(model, decoder)


def write_insertion(output: Path, sizes: Sizes, dtype: int) -> None:
    """A graph that puts image K/V into slots of the arena, so that neither leaves the device.

    Inputs `positions` int64 `[1, H, P, 3]` (0, head, position) and `slots` int64 `[B, 1, 1, 1]`
    say where; then for each layer and kind `image.{i}.{kind}` `[B, H, P, D]` and
    `arena.{i}.{kind}` `[slots, H, C, D]` -> `inserted.{i}.{kind}`. With an arena bound to its
    input and output at once only the named places are written. P may be any number of positions.
    """
    unit = "slot_axis"
    initialisers = [numpy_helper.from_array(np.array([1, 0, 0], np.int64), unit)]
    nodes = [
        helper.make_node("Mul", ["slots", unit], ["offset"]),
        helper.make_node("Add", ["positions", "offset"], ["places"]),
    ]
    inputs = [
        helper.make_tensor_value_info("positions", TensorProto.INT64, [1, sizes.heads, "P", 3]),
        helper.make_tensor_value_info("slots", TensorProto.INT64, ["B", 1, 1, 1]),
    ]
    outputs = []
    for name in (f"{layer}.{kind}" for layer in range(sizes.layers) for kind in ("key", "value")):
        image, arena, out = f"image.{name}", f"arena.{name}", f"inserted.{name}"
        nodes.append(helper.make_node("ScatterND", [arena, "places", image], [out]))
        slots: list[str | int | None] = ["slots", sizes.heads, "C", sizes.head]
        inputs.append(
            helper.make_tensor_value_info(image, dtype, ["B", sizes.heads, "P", sizes.head])
        )
        inputs.append(helper.make_tensor_value_info(arena, dtype, slots))
        outputs.append(helper.make_tensor_value_info(out, dtype, slots))
    graph = helper.make_graph(nodes, "insertion", inputs, outputs, initialisers)
    opset = [helper.make_opsetid("", _OPSET)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION), output)


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
