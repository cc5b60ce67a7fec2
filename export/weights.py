"""All weights of an engine in one file, equal tensors stored once for all graphs.

Variants share most weights: the cache dtypes of a precision share all of them, fp16 and fp32 those
that fp16 holds exactly. These are stored in fp16 and cast once, when ONNX Runtime loads a graph.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data

from runtime.model.manifest import WEIGHTS

_LEAST = 1024  # bytes; smaller tensors stay in the graph
_ALIGNMENT = 64
_HALF = ".half"


def pool(folder: Path, graphs: list[str]) -> dict[str, int]:
    """Move the weights of `graphs` in `folder` to its file WEIGHTS.

    Returns the bytes of each graph's weights in memory.
    """
    taken: dict[str, int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        pool = _Pool(file)
        for name in graphs:
            model = onnx.load(folder / name)
            taken[name] = sum(_bytes(tensor) for tensor in model.graph.initializer)
            pool.take_weights(model)
            onnx.save_model(model, folder / name)
    return taken


def _bytes(tensor: TensorProto) -> int:
    return numpy_helper.to_array(tensor).nbytes


class _Pool:
    """A file of tensors, deduplicated by content."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[bytes, int] = {}

    def take_weights(self, model: ModelProto) -> None:
        """Replace a model's weights by references to the file."""
        casts: list[NodeProto] = []
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.nbytes < _LEAST:
                continue
            name = tensor.name
            half = _as_half(array)
            if half is not None:
                array, name = half, name + _HALF
                casts.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            set_external_data(tensor, WEIGHTS, self._place(tensor.raw_data), len(tensor.raw_data))
            tensor.data_location = TensorProto.EXTERNAL
            tensor.ClearField("raw_data")
        nodes = [*casts, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    def _place(self, content: bytes) -> int:
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
            self._places[digest] = self._file.tell()
            self._file.write(content)
        return self._places[digest]


def _as_half(array: np.ndarray) -> np.ndarray | None:
    """The same values in fp16, or None if fp16 does not hold all of them exactly."""
    if array.dtype != np.float32:
        return None
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), array) else None
