"""The GPU path against PyTorch, both on the same GPU in the same minutes, and held to bars."""
