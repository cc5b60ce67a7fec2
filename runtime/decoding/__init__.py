"""What becomes of the likeliest tokens of a step: a token for each row, or beams."""
