"""`make chaos` and `make soak`: the service's promises, tested on a running one.

Every scenario starts its own server as a user would, does something to it, and returns a figure
with its verdict. The table of a full run is kept in `bench/results/reliability.md`; `make chaos
QUICK=1` runs short forms, keeps nothing, and asserts no times.
"""
