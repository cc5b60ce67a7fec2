"""Client of a remote service."""

import http.client
import json
import socket
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from multiprocessing.connection import wait
from typing import Any
from urllib.parse import urlsplit

from msgspec import convert

from runtime.errors import VignetteError
from server.bulk.inputs.timed import Attempt, TimedResponse, current
from server.http.answers import ModelsAnswer

_MOST_CONNECTIONS = 256
_CONNECT_SECONDS = 10.0
_SECONDS = 120.0  # of sending a request, and of its answer
_MOST_BYTES, _PIECE = 16 * 2**20, 64 * 2**10  # of an answer
_RETRY_SECONDS = 0.05, 60.0  # shortest and longest wait before a retry
_REFUSED, _FAILED = 400, 500  # statuses: a refusal is below the second
LATER = (408, 425, 429, 502, 503, 504)  # statuses of what may be asked for again


class ServiceFailed(VignetteError):
    """The service can't be reached, is not a Vignette service, or requires a key."""


@dataclass(frozen=True, slots=True)
class RemoteService:
    """A service. connections: how many keep it busy. identity: what decides its captions."""

    url: str
    key: str | None
    identity: dict[str, str]
    connections: int

    @property
    def model(self) -> str:
        """Name of the model that captions there."""
        return self.identity["model"]

    @property
    def engine(self) -> str:
        """Engine and precision, as its answers name them."""
        return f"{self.identity['engine']} {self.identity['precision']}"

    @classmethod
    def at(cls, url: str, key: str | None = None, model: str | None = None) -> "RemoteService":
        """Look up a model of the service. model: its name, or None for the service's first.

        Raises ServiceFailed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServiceFailed(f"{url} is no URL of a service: it looks like http://host:8000")
        if key and not (key.isascii() and key.isprintable()):
            raise ServiceFailed("the API key has characters that no key has")
        try:
            with Connection(url, key) as connection:
                _, _, answer = connection.ask("GET", "/v1/models")
            models = {each.id: each for each in convert(answer, ModelsAnswer).data}
            name = model or next(iter(models))
            json.dumps(answer, ensure_ascii=False).encode()  # rows and messages are UTF-8
        except (OSError, http.client.HTTPException, ValueError, StopIteration) as cause:
            raise ServiceFailed(
                f"{url}/v1/models does not answer as a Vignette service does ({cause!r})"
            ) from cause
        if (found := models.get(name)) is None:
            raise ServiceFailed(f"{url} has no model {name}: {', '.join(models)}")
        if found.engine is None or found.precision is None:
            raise ServiceFailed(f"{found.id} at {url} is not ready: {found.status}")
        identity = {"model": found.id, "engine": found.engine, "precision": found.precision}
        return cls(url, key, identity, max(1, min(_MOST_CONNECTIONS, 2 * found.slots)))


class Connection:
    """A keep-alive connection to a service, for use by one thread."""

    def __init__(self, url: str, key: str | None, over: threading.Event | None = None) -> None:
        """over: set once no answer is wanted any more. Raises ValueError, HTTPException."""
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._http = kind(parts.hostname or "", parts.port, timeout=_CONNECT_SECONDS)
        self._http.response_class = TimedResponse
        self._over = over or threading.Event()
        self._base = parts.path
        self._headers = {"Content-Type": "application/octet-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, float, dict[str, Any]]:
        """Send a request; returns status, seconds to wait before a retry, and the JSON answer.

        A refusal of a proxy, which is no JSON, becomes an error as a service answers them. Raises
        OSError, HTTPException and ValueError, also for an answer without end.
        """
        if self._http.sock is not None and _has_input(self._http.sock):
            self.close()  # the end, or an answer to nothing, which would be taken for the next one
        if self._http.sock is None:
            self._http.connect()
        self._http.sock.settimeout(_SECONDS)
        current.attempt = Attempt(_SECONDS, _SECONDS, self._over)
        self._http.request(method, self._base + path, body, self._headers)
        response, content = self._http.getresponse(), bytearray()
        while piece := response.read1(_PIECE):
            content += piece
            if len(content) > _MOST_BYTES:
                raise http.client.HTTPException("the answer does not end")
        response.close()  # else the connection waits for more of it
        try:
            answer = json.loads(content)
        except RecursionError as cause:
            raise ValueError("the answer is nested too deeply") from cause
        except ValueError:
            if not _REFUSED <= response.status < _FAILED or response.status in LATER:
                raise
            answer = {"error": {"message": f"{response.status} {response.reason}"}}
        shortest, longest = _RETRY_SECONDS
        wait = _seconds(response.headers.get("Retry-After", "1"))
        return response.status, min(longest, max(shortest, wait)), answer

    def abort(self) -> None:
        """End what another thread waits for on this connection."""
        sock = self._http.sock
        if sock is not None:
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS, the connection below it

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        self._http.close()


def _has_input(sock: socket.socket) -> bool:
    """Whether something can be read without waiting."""
    decrypted = isinstance(sock, ssl.SSLSocket) and sock.pending()
    return bool(decrypted or wait([sock], 0))


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header, which may be a date (RFC 9110, 10.2.3); else 1."""
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 1.0
