"""`make chaos` and `make soak`: what the service promises, tried on a running one.

Every scenario starts a server of its own as a user would, does something to it, and returns a
figure with its verdict. The table of a full run is kept in `bench/results/reliability.md`; `make
chaos QUICK=1` runs short forms, keeps nothing, and asserts no times.
"""
