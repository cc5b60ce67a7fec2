"""Small graphs beside the decoder, for a device: copies between slots, and more candidates."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from export.onnx_config import OPSET
from runtime.model.manifest import PIECE, kv_names

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


def write_reordering(output: Path, layers: int) -> None:
    """Write a graph that copies pieces within the arena, to reorder beams.

    `sources` int64 `[N]` and `targets` int64 `[N, 1]` are indices of pieces of PIECE int64; per
    layer and kind, `arena.{i}.{kind}` `[pieces, PIECE]` -> `reordered.{i}.{kind}`. All sources are
    read before any target is written, so an arena bound as both input and output is reordered in
    place.
    """
    integer = TensorProto.INT64
    info = helper.make_tensor_value_info
    nodes: list[NodeProto] = []
    inputs = [info("sources", integer, ["N"]), info("targets", integer, ["N", 1])]
    outputs = []
    for name in kv_names(layers):
        arena, read, out = f"arena.{name}", f"read.{name}", f"reordered.{name}"
        nodes.append(helper.make_node("Gather", [arena, "sources"], [read]))
        nodes.append(helper.make_node("ScatterND", [arena, "targets", read], [out]))
        inputs.append(info(arena, integer, ["A", PIECE]))
        outputs.append(info(out, integer, ["A", PIECE]))
    write_graph(output, "reordering", nodes, inputs, outputs)


def write_graph(
    output: Path,
    name: str,
    nodes: list[NodeProto],
    inputs: list[ValueInfoProto],
    outputs: list[ValueInfoProto],
    constants: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Write a small graph of ONNX's own operators."""
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    opset = [helper.make_opsetid("", OPSET)]
    graph = helper.make_graph(nodes, name, inputs, outputs, held)
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION), output)


def write_insertion(output: Path, layers: int) -> None:
    """Write a graph that copies image K/V into slots of the arena on the device.

    It copies pieces of PIECE int64, whatever their dtype: on CUDA a thread copies one piece, and 16
    bytes are the most that one instruction moves. `firsts` int64 `[B, 1, 1]` is the index of each
    slot's first piece in the arena, `pieces` int64 `[1, N, 1]` the offset of each image piece from
    there; per layer and kind, `image.{i}.{kind}` int64 `[B, N, PIECE]` and `arena.{i}.{kind}`
    `[pieces, PIECE]` -> `inserted.{i}.{kind}`. With an arena bound as both input and output, only
    these places are written.
    """
    integer = TensorProto.INT64
    arena_shape: list[str | int | None] = ["A", PIECE]
    nodes = [helper.make_node("Add", ["pieces", "firsts"], ["places"])]
    inputs = [
        helper.make_tensor_value_info("pieces", integer, [1, "N", 1]),
        helper.make_tensor_value_info("firsts", integer, ["B", 1, 1]),
    ]
    outputs = []
    for name in kv_names(layers):
        image, arena, out = f"image.{name}", f"arena.{name}", f"inserted.{name}"
        nodes.append(helper.make_node("ScatterND", [arena, "places", image], [out]))
        inputs.append(helper.make_tensor_value_info(image, integer, ["B", "N", PIECE]))
        inputs.append(helper.make_tensor_value_info(arena, integer, arena_shape))
        outputs.append(helper.make_tensor_value_info(out, integer, arena_shape))
    write_graph(output, "insertion", nodes, inputs, outputs)
