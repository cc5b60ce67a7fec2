"""Bulk captioning: from files, lists and shards to files of captions."""
