"""Changes to exported graphs, made on the ONNX files themselves."""

from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from runtime.model.manifest import PIECE, UNFORCED, Sizes

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


def for_bursts(decoder: Path) -> None:
    """Let a decoder's steps follow one another on a device, without a look from the host.

    In place of candidates it says what comes next: `next_ids` int64 `[B]` and `next_logprobs`
    float32 `[B, 1]`, which is NaN where a row's numbers broke down; and `next_lengths` int32 `[B]`,
    which is `lengths` + 1. Input `forced` int64 `[B]`: where it is not UNFORCED, `next_ids` is that
    token. Without the input nothing is forced.

    ArgMax alone has a fast kernel there; who wants more candidates asks `write_candidates`.
    """
    model = onnx.load(decoder, load_external_data=False)
    graph = model.graph
    _keep_outputs(graph, [o.name for o in graph.output if o.name not in _CANDIDATES])
    del graph.input[[i.name for i in graph.input].index("candidates")]
    one, free, none, best, row, wide, all_ = (
        f"burst.{n}" for n in ("one", "free", "none", "best", "row", "wide", "logprobs")
    )
    graph.initializer.extend(
        numpy_helper.from_array(value, name)
        for name, value in (
            (one, np.ones(1, np.int32)), (none, np.zeros(1, np.int64)),
            (f"{row}.axis", np.ones(1, np.int64)), ("forced", np.full(1, UNFORCED, np.int64)),
        )
    )  # fmt: skip
    graph.node.extend(
        [
            helper.make_node("ArgMax", ["logits"], [best], axis=-1, keepdims=0),
            helper.make_node("Less", ["forced", none], [free]),
            helper.make_node("Where", [free, best, "forced"], ["next_ids"]),
            helper.make_node("Cast", ["logits"], [wide], to=TensorProto.FLOAT),
            helper.make_node("LogSoftmax", [wide], [all_], axis=-1),
            helper.make_node("Unsqueeze", [best, f"{row}.axis"], [row]),
            helper.make_node("GatherElements", [all_, row], ["next_logprobs"], axis=1),
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


_CANDIDATES = ("candidate_ids", "candidate_logprobs", "best_logits")


def _keep_outputs(graph: GraphProto, wanted: list[str]) -> None:
    """Drop the other outputs, and all nodes that only they needed."""
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


def write_candidates(output: Path, vocabulary: int) -> None:
    """A graph that finds the likeliest tokens in the logits that a decoder has left on a device.

    `logits` float16 `[B, V]` and `candidates` int64 `[1]` -> as the decoder on a processor says
    them.
    """
    half, one, integer = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
    ids, logprobs, best = _CANDIDATES
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["logits"], ["wide"], to=one),
        helper.make_node("LogSoftmax", ["wide"], ["all"], axis=-1),
        helper.make_node("TopK", ["all", "candidates"], [logprobs, ids], axis=-1),
        helper.make_node("ReduceMax", ["wide"], [best], axes=[-1], keepdims=1),
    ]
    inputs = [info("logits", half, ["rows", vocabulary]), info("candidates", integer, [1])]
    outputs = [
        info(ids, integer, ["rows", "candidates"]),
        info(logprobs, one, ["rows", "candidates"]),
        info(best, one, ["rows", 1]),
    ]
    _write(output, "candidates", nodes, inputs, outputs)


def write_reordering(output: Path, layers: int) -> None:
    """A graph that copies pieces of the arena to other places of it, when beams change theirs.

    `sources` int64 `[N]` and `targets` int64 `[N, 1]` count pieces of PIECE int64; for each layer
    and kind `arena.{i}.{kind}` `[pieces, PIECE]` -> `reordered.{i}.{kind}`. All are read before any
    is written, so an arena that is bound to its input and output at once is reordered in place.
    """
    integer = TensorProto.INT64
    info = helper.make_tensor_value_info
    nodes: list[NodeProto] = []
    inputs = [info("sources", integer, ["N"]), info("targets", integer, ["N", 1])]
    outputs = []
    for name in (f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")):
        arena, read, out = f"arena.{name}", f"read.{name}", f"reordered.{name}"
        nodes.append(helper.make_node("Gather", [arena, "sources"], [read]))
        nodes.append(helper.make_node("ScatterND", [arena, "targets", read], [out]))
        inputs.append(info(arena, integer, ["A", PIECE]))
        outputs.append(info(out, integer, ["A", PIECE]))
    _write(output, "reordering", nodes, inputs, outputs)


def _write(
    output: Path,
    name: str,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
) -> None:
    opset = [helper.make_opsetid("", _OPSET)]
    graph = helper.make_graph(nodes, name, inputs, outputs)
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION), output)


def write_insertion(output: Path, layers: int) -> None:
    """A graph that puts image K/V into slots of the arena, so that neither leaves the device.

    It copies pieces of PIECE int64, whatever they hold: on CUDA a thread copies one piece, and 16
    bytes are the most that one instruction moves. `firsts` int64 `[B, 1, 1]` says which piece of
    the arena a slot begins with, `pieces` int64 `[1, N, 1]` where each piece of an image goes from
    there; then for each layer and kind `image.{i}.{kind}` int64 `[B, N, PIECE]` and
    `arena.{i}.{kind}` `[pieces, PIECE]` -> `inserted.{i}.{kind}`. With an arena bound to its input
    and output at once only the named places are written.
    """
    integer = TensorProto.INT64
    arena_shape: list[str | int | None] = ["A", PIECE]
    nodes = [helper.make_node("Add", ["pieces", "firsts"], ["places"])]
    inputs = [
        helper.make_tensor_value_info("pieces", integer, [1, "N", 1]),
        helper.make_tensor_value_info("firsts", integer, ["B", 1, 1]),
    ]
    outputs = []
    for name in (f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")):
        image, arena, out = f"image.{name}", f"arena.{name}", f"inserted.{name}"
        nodes.append(helper.make_node("ScatterND", [arena, "places", image], [out]))
        inputs.append(helper.make_tensor_value_info(image, integer, ["B", "N", PIECE]))
        inputs.append(helper.make_tensor_value_info(arena, integer, arena_shape))
        outputs.append(helper.make_tensor_value_info(out, integer, arena_shape))
    _write(output, "insertion", nodes, inputs, outputs)


def _rename_output(graph: GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
