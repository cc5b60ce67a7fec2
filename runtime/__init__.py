"""Runs an exported GIT: a batched greedy decode loop over ONNX Runtime.

Reading order: `manifest` (the contract with export/) -> `config` -> `errors` -> `providers` ->
`preprocess` -> `tokenizer` -> `request` -> `scheduler` -> `runner` -> `engine`.
"""
