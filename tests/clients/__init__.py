"""Clients that can't share an environment with the rest: `make clients` runs them."""
