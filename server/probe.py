"""`python -m server.probe`: exit status 0 if the server on this machine is alive, for containers.

It asks /health/live, not /health/ready: a draining server is healthy, and must not be killed. Host
and port come from the server's own variables.
"""

import os
import sys
import urllib.error
import urllib.request

_SECONDS = 2
_ANY = ("0.0.0.0", "::", "")  # addresses to listen on, not to connect to


def main() -> int:
    """Request /health/live; return 0 if it answers 200, else 1."""
    host = os.environ.get("VIGNETTE_HOST", "")
    host = "127.0.0.1" if host in _ANY else f"[{host}]" if ":" in host else host
    port = os.environ.get("VIGNETTE_OPS_PORT") or os.environ.get("VIGNETTE_PORT", "8000")
    url = f"http://{host}:{port}/health/live"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            return int(response.status != 200)
    except (urllib.error.URLError, OSError) as cause:
        print(f"{url}: {cause}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
