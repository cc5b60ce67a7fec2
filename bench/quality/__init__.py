"""Effect of settings on caption quality, measured on pictures with human references."""
