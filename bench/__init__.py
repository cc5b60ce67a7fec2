"""Vignette against what people do today, measured side by side."""
