"""Time by kind of node, from ONNX Runtime's profiler."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tqdm import tqdm

from bench.common.isolated import isolated
from bench.common.settings import Settings
from runtime.model import manifest as manifests
from runtime.providers.session import Placement, session_options

_ROWS = 16
_RUNS = 8
_SHOWN = 8  # kinds of nodes; the rest is summed up
_COMBINATION = "int8/int8/int8"


def measure(settings: Settings) -> dict[str, Any]:
    """Share of each kind of node in either graph's time, on the CPU execution provider."""
    graphs = ("encoder", "decoder")
    return {
        "combination": _COMBINATION,
        "graphs": {
            graph: isolated(_shares, graph, settings)
            for graph in tqdm(graphs, desc="profile", unit="graph")
        },
    }


def _shares(graph: str, settings: Settings) -> list[tuple[str, float]]:
    manifest = manifests.load(settings.engine)
    variant = manifest.variant(graph, manifest.combination(_COMBINATION))
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(Placement("cpu"))
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / graph)
        session = ort.InferenceSession(
            settings.engine / variant.file, options, providers=["CPUExecutionProvider"]
        )
        feeds = _feeds(session, manifest.sizes)
        for _ in range(_RUNS):
            session.run(["candidate_ids"] if graph == "decoder" else None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text())
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"]] += event["dur"]
    total = sum(times.values())
    shown = times.most_common(_SHOWN)
    rest = total - sum(time for _, time in shown)
    return [(name, time / total) for name, time in [*shown, ("all others", rest)]]


def _feeds(session: ort.InferenceSession, sizes: manifests.Sizes) -> dict[str, np.ndarray]:
    """Inputs: one image, or a decode step of 16 rows without text in their cache."""
    rng = np.random.default_rng(0)
    if session.get_inputs()[0].name == "pixels":
        return {"pixels": rng.integers(0, 256, (1, 3, sizes.image, sizes.image), np.uint8)}
    lengths = np.full(_ROWS, sizes.prefix, np.int32)
    cache = (_ROWS, sizes.heads, sizes.prefix + 64, sizes.head)
    feeds = {
        value.name: rng.integers(-99, 99, cache, np.int8)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    return feeds | {
        "token_ids": np.ones((_ROWS, 1), np.int64),
        "lengths": lengths,
        "total_length": lengths[:1] + 1,
        "candidates": np.ones(1, np.int64),
    }
