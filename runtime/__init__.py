"""Run an exported GIT model: a batched decode loop over ONNX Runtime.

Reading order: `model/` (the contents of an engine folder) -> `planning/` -> `providers/` ->
`execution/` -> `request`, `limits` -> `decoding/` -> `sequence`, `scheduler`, `pacing` -> `engine`
-> `stepper`, `async_engine`.
"""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later send telemetry unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
