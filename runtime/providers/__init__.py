"""ONNX Runtime's execution providers: detection, options, and sessions."""
