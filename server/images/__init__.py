"""Encoded images to pixels: fetching, cost estimates, decoding in separate processes."""
