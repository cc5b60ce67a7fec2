"""Runs an exported GIT: a batched greedy decode loop over ONNX Runtime.

Reading order: `manifest` (the contract with export/) -> `config` -> `errors` -> `machine` ->
`plan` -> `gpu` -> `tensorrt` -> `providers` -> `preprocess` -> `tokenizer` -> `request` ->
`scheduler` -> `pacing` -> `encoder` -> `runner` -> `device_runner` -> `opening` -> `engine` ->
`bulk` -> `remote` -> `lines` -> `__main__` (files of images to lines of captions).
"""
