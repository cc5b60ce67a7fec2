"""`python -m server.probe`: exit status 0 if the server on this machine is alive, for containers.

It asks /health/live, not /health/ready: a server that drains is healthy, and must not be killed.
"""

import os
import sys
import urllib.error
import urllib.request

_SECONDS = 2


def main() -> int:
    """Ask the port that the server was given; 0 or 1."""
    url = f"http://127.0.0.1:{os.environ.get('VIGNETTE_PORT', '8000')}/health/live"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            return int(response.status != 200)
    except (urllib.error.URLError, OSError) as cause:
        print(f"{url}: {cause}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
