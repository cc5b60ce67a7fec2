"""Edits of exported ONNX graphs."""

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from export.device_graphs import CANDIDATES
from runtime.model.manifest import UNFORCED, Sizes

Scales = dict[str, np.ndarray]  # "{layer}.key" or "{layer}.value" -> float32 [H, D]


def share_weights(graph: Path, data: str) -> None:
    """Move a graph's weights to the file `data` beside it, for other graphs to share."""
    model = onnx.load(graph)
    graph.unlink()
    (graph.parent / data).unlink(missing_ok=True)
    onnx.save_model(model, graph, save_as_external_data=True, location=data, size_threshold=1024)


def drop_statistics(graph: Path) -> None:
    """Leave out mean and variance of SkipLayerNormalization, which the exporter had to name."""
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SkipLayerNormalization":
            node.output[1] = node.output[2] = ""
    onnx.save_model(model, graph)


def drop_unused_sums(graph: GraphProto) -> None:
    """Leave out sums of SkipLayerNormalization that no node takes: they would be written."""
    taken = {name for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type == "SkipLayerNormalization" and node.output[-1] not in taken:
            del node.output[1:]


def with_int8_prefix(encoder: Path, output: Path, scales: Scales) -> None:
    """Write an encoder with int8 K/V, `round(x / scale)` per channel; weights stay in place."""
    model = onnx.load(encoder, load_external_data=False)
    graph = model.graph
    zero, one = "cache.zero_point", "cache.unit_scale"
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), zero))
    graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), one))
    for value in graph.output:
        name, layer_kind = value.name, value.name.removeprefix("image.")
        _rename_output(graph, name, f"{name}.float")
        # Scales are per channel of each head; QuantizeLinear supports a single axis only.
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
    """Write a decoder over an int8 cache; GroupQueryAttention takes a scale per channel."""
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
    del graph.value_info[:]  # it states the old type
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


def for_bursts(decoder: Path) -> None:
    """Rewrite a decoder so that its steps follow one another on a device without the host.

    Outputs in place of candidates: `next_ids` int64 `[B]`; `next_logprobs` float32 `[B, 1]`, NaN
    where a row's computation failed; `next_lengths` int32 `[B]`, equal to `lengths` + 1. Input
    `forced` int64 `[B]`, optional: where it is not UNFORCED, `next_ids` is that token. `logits` are
    `[B, 1, W]` then, with the vocabulary rounded up to W, or as before; see `_widen_head`.

    Only ArgMax has a fast kernel there; `write_candidates` makes a graph for more candidates.
    """
    model = onnx.load(decoder)
    graph = model.graph
    _widen_head(graph)
    _keep_outputs(graph, [o.name for o in graph.output if o.name not in CANDIDATES])
    del graph.input[[i.name for i in graph.input].index("candidates")]
    names = "one", "free", "none", "best", "row", "wide", "logprobs", "found", "flat", "column"
    one, free, none, best, row, wide, all_, found, flat, column = (f"burst.{n}" for n in names)
    graph.initializer.extend(
        numpy_helper.from_array(value, name)
        for name, value in (
            (one, np.ones(1, np.int32)), (none, np.zeros(1, np.int64)),
            (flat, np.array([-1])), (column, np.array([-1, 1])),
            ("forced", np.full(1, UNFORCED, np.int64)),
        )
    )  # fmt: skip
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], [row], axis=-1),
            helper.make_node("Reshape", [row, flat], [best]),
            helper.make_node("Less", ["forced", none], [free]),
            helper.make_node("Where", [free, best, "forced"], ["next_ids"]),
            helper.make_node("Cast", ["logits"], [wide], to=TensorProto.FLOAT),
            helper.make_node("LogSoftmax", [wide], [all_], axis=-1),
            helper.make_node("GatherElements", [all_, row], [found], axis=-1),
            helper.make_node("Reshape", [found, column], ["next_logprobs"]),
            helper.make_node("Add", ["lengths", one], ["next_lengths"]),
        ]
    )
    graph.input.append(helper.make_tensor_value_info("forced", TensorProto.INT64, ["choices"]))
    graph.output.extend(
        helper.make_tensor_value_info(*made)
        for made in (
            ("next_ids", TensorProto.INT64, ["rows"]),
            ("next_logprobs", TensorProto.FLOAT, ["rows", 1]),
            ("next_lengths", TensorProto.INT32, ["rows"]),
        )
    )
    onnx.save_model(model, decoder)


_HEAD_COLUMNS = 8  # fp16 products are fast for multiples of it
_NO_TOKEN = -65_504.0  # fp16's lowest number: a logit that is never the largest


def _widen_head(graph: GraphProto) -> None:
    """Round the columns of the product with the vocabulary up, and take its bias from a node of its
    own. CUDA's product of 30,522 columns takes 60 us and Gemm's bias 32, this one 23 and 12.

    A head that stays in fp32 is left as it is.
    """
    made = {name: node for node in graph.node for name in node.output}
    head = made["logits"]
    if head.op_type != "Gemm":
        return
    settings = {each.name: helper.get_attribute_value(each) for each in head.attribute}
    assert settings == {"alpha": 1.0, "beta": 1.0, "transB": 1}
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    taken, weight, bias = head.input
    missing = -len(held[bias]) % _HEAD_COLUMNS
    wide = np.ascontiguousarray(np.pad(held[weight], ((0, missing), (0, 0))).T)
    shifts = np.pad(held[bias], (0, missing), constant_values=_NO_TOKEN)
    hidden = made[taken].input[0]  # `taken` has the only position of each row, without an axis
    graph.initializer.extend(
        numpy_helper.from_array(value, name)
        for name, value in (("head.wide", wide), ("head.shifts", shifts))
    )
    graph.node.remove(head)
    graph.node.extend(
        [
            helper.make_node("MatMul", [hidden, "head.wide"], ["head.product"]),
            helper.make_node("Add", ["head.product", "head.shifts"], ["logits"]),
        ]
    )
    # The embedding may have the same weights.
    _keep_outputs(graph, [output.name for output in graph.output])
    used = {name for node in graph.node for name in node.input}
    for tensor in [each for each in graph.initializer if each.name not in used]:
        graph.initializer.remove(tensor)
    [output] = (value for value in graph.output if value.name == "logits")
    kind = output.type.tensor_type.elem_type
    output.CopyFrom(helper.make_tensor_value_info("logits", kind, ["rows", 1, len(shifts)]))


def _keep_outputs(graph: GraphProto, wanted: list[str]) -> None:
    """Drop all outputs but `wanted`, and the nodes that only those needed."""
    outputs = [output for output in graph.output if output.name in wanted]
    del graph.output[:]
    graph.output.extend(outputs)
    needed, nodes = set(wanted), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
