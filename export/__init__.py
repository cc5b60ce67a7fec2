"""Turns a GIT checkpoint into an engine folder: two ONNX graphs that are proven against PyTorch.

Reading order: `checkpoint`, `random_weights` (what to export) -> `modeling` (GIT as two torch
modules) -> `onnx_config` (the same to Optimum) -> `graphs` (what is done to graphs afterwards) ->
`pictures` -> `reference`, `verify` (ONNX against PyTorch) -> `variants`, `fp16`, `gate` (other
precisions, and which to keep) -> `build` (all of it, in order).
"""

import os

# From 1.29 on ONNX Runtime reports to its makers, unless this is said before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
