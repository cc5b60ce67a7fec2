"""From a step's likeliest tokens to the next token of each row: greedy, sampling or beams."""
