"""Helpers shared by the benchmark's sections."""
