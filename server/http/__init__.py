"""HTTP: requests parsed, answers and errors rendered."""
