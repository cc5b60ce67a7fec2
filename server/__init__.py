"""Captions over HTTP: front-ends that speak it, workers that own engines, a supervisor over both.

Reading order: `settings` -> `__main__` -> `supervisor`, `children`, `ports` -> `wire` (what the
processes say) -> `frontend` -> `app` (routes) -> `handlers/` -> `forms` -> `errors` (the table of
answers) -> `service` (a request's way) -> `keys`, `usage`, `admission`, `cache`, `fetching` ->
`decoding` -> `links`, `dispatch` -> `worker` -> `metrics`, `logs`, `tracing`.
"""
