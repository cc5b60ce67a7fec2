"""What a setting does to captions, on pictures that people described."""
