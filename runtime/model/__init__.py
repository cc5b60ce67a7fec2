"""What an engine folder says of its model: manifest, tokenizer, preprocessing."""
