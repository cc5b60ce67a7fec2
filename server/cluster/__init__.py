"""The service over a Ray cluster: ingresses on its nodes, engines in replicas of Ray Serve.

Both halves are those of one machine, with Ray in between. An ingress (`ingress.py`) is a supervisor
with front-ends; in place of workers, `relay.py` takes the front-ends' requests and calls a replica.
A replica (`replica.py`) is a supervisor with a worker, and passes calls to it as a front-end does.
"""
