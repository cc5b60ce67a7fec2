"""One part of the benchmark a file."""
