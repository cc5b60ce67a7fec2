"""Turns a GIT checkpoint into an engine folder: two ONNX graphs that are proven against PyTorch.

Reading order: `checkpoint` (what to export) -> `split` (GIT as two torch modules) ->
`onnx_config` (the same to Optimum) -> `pictures` -> `verify` (ONNX against PyTorch) -> `build`
(all of it, in order).
"""
