"""What one client may have of what others need, too: slots, decoders, bytes, and refusals."""
