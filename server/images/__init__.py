"""Encoded images to pixels: fetched, estimated, decoded in processes of their own."""
