"""Runs an exported GIT: a batched decode loop over ONNX Runtime.

Reading order: `model/` (what an engine folder says) -> `planning/` -> `providers/` ->
`execution/` -> `request`, `limits` -> `decoding/` -> `sequence`, `scheduler`, `pacing` -> `engine`
-> `stepper`, `async_engine`.
"""

import os

# From 1.29 on ONNX Runtime reports to its makers, unless this is said before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
