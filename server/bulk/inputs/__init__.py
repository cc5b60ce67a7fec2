"""What a run captions: items from files, folders, lists, tables and shards."""
