"""Runners of both graphs, with their state in host memory or on a device."""
