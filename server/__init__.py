"""Captions over HTTP: front-ends speak the protocol, workers own engines, a supervisor runs both.

Reading order, along a request: `__main__` and `settings` -> `processes/supervisor` ->
`processes/frontend` -> `http/app` (routes), `http/caption`, `http/intake` -> `service/service`,
`service/model` -> `images/pool` -> `ipc/dispatcher`, `ipc/messages` -> `processes/worker`; then
`protocols/errors` (errors to responses), `telemetry/`. `bulk/` captions files, `grpc/` speaks
KServe's protocol, `cluster/` runs all of it on Ray.
"""
