"""The graph of a step of beam search on a device, which follows a decode step there."""

from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from export.device_graphs import PIECES, arena, moving, write_graph
from runtime.model.manifest import Sizes

_NEVER = np.float32(-1e9)  # added to the score of an ended beam, as in transformers
_LOWEST = np.finfo(np.float32).min  # log-probability where a row's computation failed
_FLOAT, _HALF, _INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def write_search(output: Path, sizes: Sizes) -> None:
    """Write a graph that chooses the next tokens of N images with B beams each.

    Of the decode step before: `logits` float16 `[R, W]`, `logprobs` float32 `[R, 1]` of each row's
    likeliest token. K = 2 B, of which B may end; `candidates` (K) and `beams` (B) are int64 `[1]`
    on the host. `rows` and `slots` int64 `[N, B]`: where an image's beams are in R, and in arena
    and `tokens` (they differ for padding images). `scores` float32 `[N, B]`; `ends` int64 `[N, 1]`,
    the token that ends a beam. `tokens` int64 `[S]` of the next step. `arena` and what belongs to
    it: see `device_graphs.pieces`.

    Outputs, best first: `best_ids`, `best_parents` int64 and `best_logprobs`, `best_scores` float32
    `[N, K]`, the best continuations; `kept` int64 `[N, B]`, those that go on; `next_scores`
    float32 `[N, B]`; `next_tokens` `[S]`; `reordered`, the arena with their text. `scores`,
    `tokens` and arena may be bound as both input and output.
    """
    info = helper.make_tensor_value_info
    image, beam, best = "images", ["images", "width"], ["images", "twice"]
    of_arena, reordered = arena("reordered")
    inputs = [
        info("logits", _HALF, ["R", "W"]), info("logprobs", _FLOAT, ["R", 1]),
        info("candidates", _INT, [1]), info("beams", _INT, [1]), info("rows", _INT, beam),
        info("slots", _INT, beam), info("scores", _FLOAT, beam), info("ends", _INT, [image, 1]),
        info("tokens", _INT, ["S"]), *of_arena,
    ]  # fmt: skip
    outputs = [
        info("best_ids", _INT, best), info("best_parents", _INT, best),
        info("best_logprobs", _FLOAT, best), info("best_scores", _FLOAT, best),
        info("kept", _INT, beam), info("next_scores", _FLOAT, beam),
        info("next_tokens", _INT, ["S"]), reordered,
    ]  # fmt: skip
    whole = {
        "first": [0], "middle_axis": [2], "zero": 0, "most": sizes.vocabulary - 1, "flat": [-1],
        "column": [-1, 1],
    }  # fmt: skip
    constants: dict[str, np.ndarray] = {k: np.array(v, np.int64) for k, v in whole.items()}
    constants |= {"lowest": _LOWEST.reshape(1), "never": _NEVER.reshape(1), **PIECES}
    nodes = [*_choosing(), *moving()]
    write_graph(output, "search", nodes, inputs, outputs, constants)


def _choosing() -> list[NodeProto]:
    """From logits to the next tokens."""
    node = helper.make_node
    return [
        # Log-probabilities differ as logits do, so that only the likeliest ones are computed.
        node("Gather", ["logits", "rows"], ["beam_logits"], axis=0),
        node("Gather", ["logprobs", "rows"], ["beam_logprobs"], axis=0),
        node("TopK", ["beam_logits", "candidates"], ["values", "found"], axis=-1),
        node("Cast", ["values"], ["wide"], to=_FLOAT),
        node("Gather", ["wide", "first"], ["largest"], axis=2),
        node("Sub", ["wide", "largest"], ["below"]),
        node("Add", ["below", "beam_logprobs"], ["all"]),
        node("IsNaN", ["all"], ["failed"]),
        node("Where", ["failed", "lowest", "all"], ["image_logprobs"]),
        # Among NaN an index may be anything.
        node("Clip", ["found", "zero", "most"], ["image_ids"]),
        # All continuations of an image's beams, and the best of them.
        node("Unsqueeze", ["scores", "middle_axis"], ["before"]),
        node("Add", ["image_logprobs", "before"], ["after"]),
        node("Flatten", ["after"], ["ranked"], axis=1),
        node("TopK", ["ranked", "candidates"], ["best_scores", "chosen"], axis=-1),
        node("Flatten", ["image_ids"], ["flat_ids"], axis=1),
        node("Flatten", ["image_logprobs"], ["flat_logprobs"], axis=1),
        node("GatherElements", ["flat_ids", "chosen"], ["best_ids"], axis=1),
        node("GatherElements", ["flat_logprobs", "chosen"], ["best_logprobs"], axis=1),
        node("Div", ["chosen", "candidates"], ["best_parents"]),
        # Those that go on.
        node("Equal", ["best_ids", "ends"], ["ending"]),
        node("Cast", ["ending"], ["penalty"], to=_FLOAT),
        node("Mul", ["penalty", "never"], ["added"]),
        node("Add", ["best_scores", "added"], ["going_on"]),
        node("TopK", ["going_on", "beams"], ["next_scores", "kept"], axis=-1),
        node("GatherElements", ["best_ids", "kept"], ["next_ids"], axis=1),
        node("Reshape", ["next_ids", "flat"], ["updates"]),
        node("Reshape", ["slots", "flat"], ["to"]),
        node("Reshape", ["slots", "column"], ["updated"]),
        node("ScatterND", ["tokens", "updated", "updates"], ["next_tokens"]),
        # Where the text of those is that go on.
        node("GatherElements", ["best_parents", "kept"], ["parents"], axis=1),
        node("GatherElements", ["slots", "parents"], ["taken"], axis=1),
        node("Reshape", ["taken", "flat"], ["from"]),
    ]
