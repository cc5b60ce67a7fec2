"""What processes say to each other, and by what way."""
