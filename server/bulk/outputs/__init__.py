"""What a run writes: rows in files of several forms."""
