"""CORS headers."""

_METHODS = "GET, HEAD, POST"
_REQUEST_HEADERS = (
    "Accept, Authorization, Content-Type, X-API-Key, X-Priority, X-Request-Id, X-Timeout-Ms"
)
_ANSWER_HEADERS = "Retry-After, X-Request-Id"
_PREFLIGHT_SECONDS = 600


def cors_headers(origin: str | None, allowed: tuple[str, ...]) -> dict[str, str]:
    """Headers that let a page of an allowed origin read an answer (Fetch standard, 3.2)."""
    if not allowed:
        return {}
    if origin is None or (origin not in allowed and "*" not in allowed):
        return {"Vary": "Origin"}
    return {
        "Vary": "Origin",
        "Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
        "Access-Control-Expose-Headers": _ANSWER_HEADERS,
    }


PREFLIGHT = {
    "Access-Control-Allow-Methods": _METHODS,
    "Access-Control-Allow-Headers": _REQUEST_HEADERS,
    "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
}
