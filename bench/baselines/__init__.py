"""What people do today: real servers around Hugging Face's `generate`."""
