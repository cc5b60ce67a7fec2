"""The servers that are compared: Vignette, and PyTorch behind several others."""
