"""A web server on a thread of the test's process."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def served(kind: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server whose requests are handled by `kind`; yields its URL."""
    quiet = type("Quiet", (kind,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
