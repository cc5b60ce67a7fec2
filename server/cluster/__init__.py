"""The service over a Ray cluster: front doors on its nodes, engines in replicas of Ray Serve.

Both halves are those of one machine, and Ray stands between them. A door (`door.py`) is a
supervisor with front-ends; where on one machine there were workers, `relay.py` takes what the
front-ends send and calls a replica. A replica (`replica.py`) is a supervisor with a worker; what it
is called with goes to that worker as from a front-end.
"""
