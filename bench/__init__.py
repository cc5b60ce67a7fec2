"""Measures Vignette against PyTorch. Talks to servers over HTTP only."""
