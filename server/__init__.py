"""Captions over HTTP: Tornado in front, one thread that owns the engine behind.

Reading order: `settings` -> `__main__` (start, drain) -> `app` (routes, the error table) ->
`handlers/` -> `admission` -> `worker` -> `metrics`.
"""
