"""Turn a GIT checkpoint into an engine folder: two ONNX graphs proven against PyTorch.

Reading order: `checkpoint`, `random_weights` (what to export) -> `modeling` (GIT as two torch
modules) -> `onnx_config` (their configuration for Optimum) -> `graphs` (edits of exported graphs)
-> `pictures` -> `reference`, `verify` (ONNX against PyTorch) -> `variants`, `fp16`, `gate` (other
precisions, and which to keep) -> `build` (all steps, in order).
"""

import os

# ONNX Runtime 1.29 and later send telemetry unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
