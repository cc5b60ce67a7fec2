"""Scenarios: `image_url` with forbidden targets."""

import json
import socket
import urllib.error
import urllib.request
from typing import Any

from bench.reliability.running import Verdict, service

TRICKS = (
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/x.png",
    "https://[::ffff:127.0.0.1]/x.png",
    "https://2130706433/x.png",
    "https://0177.0.0.1/x.png",
    "https://127.1/x.png",
    "https://localhost/x.png",
    "https://localhost./x.png",
    "https://allowed.example@localhost/x.png",
    "https://allowed.example:22/x.png",
    "https://allowed.example\\@localhost/x.png",
    "http://allowed.example/x.png",
    "file:///etc/passwd",
    "https://not-allowed.example/x.png",
    "https://",
    "ftp://allowed.example/x",
)


def url_tricks(long: bool) -> Verdict:
    """Forbidden targets of `image_url`, even private hosts in the list of allowed domains."""
    allowed = "allowed.example,localhost,127.0.0.1,127.1,0177.0.0.1,2130706433,169.254.169.254,::1"
    with (
        service("--image-url-domains", allowed) as it,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        port = listener.getsockname()[1]
        tricks = (*TRICKS, f"https://127.0.0.1:{port}/x.png", f"https://localhost:{port}/x.png")
        found = {url: _post_json(it.port, {"image_url": url}) for url in tricks}
        listener.settimeout(0.2)
        try:
            listener.accept()
            reached = True
        except TimeoutError:
            reached = False
        passed = [url for url, code in found.items() if code != "forbidden_url"]
        return Verdict(
            f"{len(tricks) - len(passed)} of {len(tricks)} refused, private connection made: "
            f"{reached}" + (f"; not refused: {passed}" if passed else ""),
            not passed and not reached,
        )


def _post_json(port: int, fields: dict[str, Any]) -> str:
    """The error code of the answer; its status if the request succeeds."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/caption", json.dumps(fields).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]["code"]
