"""Small graphs beside the decoder, for a device: copies between slots, and more candidates."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from export.onnx_config import OPSET

CANDIDATES = ("candidate_ids", "candidate_logprobs", "best_logits")
_IR_VERSION = 8  # as the exporter writes


def write_candidates(output: Path) -> None:
    """Write a graph that finds the likeliest tokens in logits on a device.

    `logits` float16 `[B, W]` and `candidates` (K) int64 `[1]` -> `candidate_ids` int64 `[B, K]`,
    `candidate_logprobs` float32 `[B, K]` and `best_logits` float32 `[B, 1]`, as from the decoder
    on a CPU.
    """
    half, one, integer = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT64
    ids, logprobs, best = CANDIDATES
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Cast", ["logits"], ["wide"], to=one),
        helper.make_node("LogSoftmax", ["wide"], ["all"], axis=-1),
        helper.make_node("TopK", ["all", "candidates"], [logprobs, ids], axis=-1),
        # Not by ReduceMax, which takes 2.8 ms there.
        helper.make_node("Gather", [ids, "first"], ["likeliest"], axis=1),
        helper.make_node("GatherElements", ["wide", "likeliest"], [best], axis=1),
    ]
    inputs = [info("logits", half, ["rows", "W"]), info("candidates", integer, [1])]
    outputs = [
        info(ids, integer, ["rows", "candidates"]),
        info(logprobs, one, ["rows", "candidates"]),
        info(best, one, ["rows", 1]),
    ]
    first = {"first": np.zeros(1, np.int64)}
    write_graph(output, "candidates", nodes, inputs, outputs, first)


def write_insertion(output: Path) -> None:
    """Write a graph that copies image K/V into slots of the arena: `slots` int64 `[B]`, `images`
    int64 `[A, B, N, L]` -> `inserted`; see `pieces` for the rest.
    """
    nodes = [
        *pieces("slots", "targets"),
        helper.make_node("ScatterND", ["arena", "targets", "images"], ["inserted"]),
    ]
    info, integer = helper.make_tensor_value_info, TensorProto.INT64
    given = [info("slots", integer, ["B"]), info("images", integer, ["A", "B", "N", "L"])]
    inputs, result = arena("inserted")
    write_graph(output, "insertion", nodes, [*given, *inputs], [result], PIECES)


def write_reordering(output: Path) -> None:
    """Write a graph that copies between slots of the arena: `from` and `to` int64 `[B]` ->
    `reordered`; see `pieces` for the rest.
    """
    info, integer = helper.make_tensor_value_info, TensorProto.INT64
    given = [info(name, integer, ["B"]) for name in ("from", "to")]
    inputs, result = arena("reordered")
    write_graph(output, "reordering", moving(), [*given, *inputs], [result], PIECES)


def moving() -> list[NodeProto]:
    """Nodes that copy in all arrays: all slots `from` are read before any slot `to` is written."""
    return [
        *pieces("from", "sources"),
        *pieces("to", "targets"),
        helper.make_node("Squeeze", ["sources", "last_axis"], ["read_at"]),
        helper.make_node("Gather", ["arena", "read_at"], ["read"], axis=0),
        helper.make_node("ScatterND", ["arena", "targets", "read"], ["reordered"]),
    ]


def pieces(slots: str, output: str) -> list[NodeProto]:
    """Nodes that find pieces of slots in the arena, int64 `[pieces, L]`, whatever its dtype.

    On CUDA a thread copies one piece. `slots` int64 `[B]`; of the arena `room` int64 `[1]`, the
    pieces of a slot, `arrays` int64 `[A, 1, 1, 1]`, the first piece of each array, and `places`
    int64 `[N, 1]`, pieces of a slot by their distance from its first one -> `output` int64
    `[A, B, N, 1]`. With an arena bound as both input and output, only these are written.
    """
    node = helper.make_node
    return [
        node("Mul", [slots, "room"], [f"{output}.slots"]),
        node("Unsqueeze", [f"{output}.slots", "two_axes"], [f"{output}.rows"]),
        node("Add", ["arrays", f"{output}.rows"], [f"{output}.first"]),
        node("Add", [f"{output}.first", "places"], [output]),
    ]


PIECES: Mapping[str, np.ndarray] = MappingProxyType(
    {"two_axes": np.array([1, 2]), "last_axis": np.array([3])}
)


def arena(output: str) -> tuple[list[ValueInfoProto], ValueInfoProto]:
    """Inputs that `pieces` takes besides the slots, with the arena; and the arena as output."""
    info, integer = helper.make_tensor_value_info, TensorProto.INT64
    inputs = [
        info("arena", integer, ["P", "L"]), info("room", integer, [1]),
        info("arrays", integer, ["A", 1, 1, 1]), info("places", integer, ["N", 1]),
    ]  # fmt: skip
    return inputs, info(output, integer, ["P", "L"])


def write_graph(
    output: Path,
    name: str,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Write a small graph of ONNX's own operators, with those of `constants` that it takes."""
    taken = {name for node in nodes for name in node.input}
    held = [numpy_helper.from_array(v, name) for name, v in constants.items() if name in taken]
    opset = [helper.make_opsetid("", OPSET)]
    graph = helper.make_graph(nodes, name, inputs, outputs, held)
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION), output)
