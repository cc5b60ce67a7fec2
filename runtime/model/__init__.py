"""The model in an engine folder: manifest, tokenizer, preprocessing."""
