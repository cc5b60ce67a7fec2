"""Captions over HTTP: front-ends that speak it, workers that own engines, a supervisor over both.

Reading order: `settings` -> `__main__` -> `supervisor` -> `wire` (what the processes say) ->
`frontend` -> `app` (routes) -> `handlers/` -> `forms` -> `errors` (the table of answers) ->
`service` (a request's way) -> `keys`, `admission`, `cache`, `fetching` -> `decoding` -> `dispatch`
-> `worker` -> `metrics`, `logs`.
"""
