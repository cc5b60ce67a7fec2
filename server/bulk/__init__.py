"""Captions in bulk: images from wherever they lie, rows to where they are read."""
