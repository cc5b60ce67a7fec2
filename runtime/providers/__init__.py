"""Execution providers of ONNX Runtime: what is here, and sessions on it."""
