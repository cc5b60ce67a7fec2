"""Runs an exported GIT: a batched greedy decode loop over ONNX Runtime.

Reading order: `manifest` (the contract with export/) -> `config` -> `errors` -> `machine` ->
`plan` -> `gpu` -> `tensorrt` -> `providers` -> `preprocess` -> `tokenizer` -> `request` ->
`scheduler` -> `pacing` -> `encoder` -> `runner` -> `device_runner` -> `opening` -> `engine` ->
`bulk` -> `remote` -> `lines` -> `__main__` (files of images to lines of captions).
"""

import os

# From 1.29 on ONNX Runtime reports to its makers, unless this is said before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
