"""Turn a GIT checkpoint into an engine folder: two ONNX graphs proven against PyTorch.

Reading order: `checkpoint`, `untrusted`, `tokenizer`, `random_weights` (what to export) ->
`modeling` (GIT as two torch modules), for GPUs `vision`, `fused_prefix` -> `onnx_config` (their
configuration for Optimum) -> `graphs` (edits of exported graphs), `weights` -> `pictures` ->
`reference`, `verify` (ONNX against PyTorch) -> `variants`, `row_scales`, `fp16`, `device_graphs`,
`search_graph`, `gate` (other precisions, and which to keep), `self_test` -> `build` (all steps, in
order), `output_folder`.
"""

import os

# ONNX Runtime 1.29 and later send telemetry unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
