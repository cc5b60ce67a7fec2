"""Run an exported GIT model: a batched decode loop over ONNX Runtime.

ARCHITECTURE.md says what its files are and in which order to read them.
"""

import os

__version__ = "0.1.0"

# ONNX Runtime 1.29 and later send telemetry unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
