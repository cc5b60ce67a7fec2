"""Captions over HTTP: Tornado in front, one thread that owns the engine behind.

Reading order: `settings` -> `__main__` (start, drain) -> `service` (the parts) -> `app` (routes) ->
`handlers/` -> `errors` (the table of answers) -> `admission` -> `worker` -> `metrics`.
"""
