"""Captions by a service elsewhere, as `server.bulk.local` makes them here."""

import http.client
import json
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from runtime.errors import VignetteError
from server.bulk.captioning import RunFailed, Unfit
from server.bulk.items import Said

_MOST_CONNECTIONS = 256
_SECONDS = 120.0  # for one answer
_PATIENCE = 300.0  # seconds without an answer of any use, before all is given up
_IDENTITY = ("model", "engine", "precision")
_LATER = (429, 503, 504)
_WRONG_SERVICE = (401, 404, 405)  # whatever is sent, it will answer that


class ServiceFailed(VignetteError):
    """The service can't be reached, is none of ours, or wants a key."""


@dataclass(frozen=True, slots=True)
class RemoteService:
    """A service by its URL. `connections` keep it busy; `identity` decides what it says."""

    url: str
    key: str | None
    identity: dict[str, str]
    connections: int

    @property
    def model(self) -> str:
        """Which captions there."""
        return self.identity["model"]

    @classmethod
    def at(cls, url: str, key: str | None = None, model: str | None = None) -> "RemoteService":
        """Ask the service what it is. model: which of its models, or its first.

        Raises ServiceFailed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServiceFailed(f"{url} is no URL of a service: it looks like http://host:8000")
        with _Connection(url, key) as connection:
            try:
                status, _, answer = connection.ask("GET", "/health/ready")
                name = model or next(iter(answer["models"]))
                workers = [w for w in answer["workers"] if w["model"] == name]
                slots = sum(w.get("slots", 0) * w.get("engines", 1) for w in workers)
                ready = [w for w in workers if w["state"] == "ready"]
                identity = [{name: w[name] for name in _IDENTITY} for w in ready]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as cause:
                raise ServiceFailed(
                    f"{url}/health/ready does not answer as a Vignette service does ({cause!r})"
                ) from cause
        if name not in answer["models"]:
            raise ServiceFailed(f"{url} has no model {name}: {', '.join(answer['models'])}")
        if status != 200 or not identity:
            raise ServiceFailed(f"{name} at {url} is not ready: {answer['models'][name]}")
        return cls(url, key, identity[0], max(1, min(_MOST_CONNECTIONS, 2 * slots)))


class RemoteCaptioner:
    """Has a service caption images, each of many threads over a connection of its own.

    What the service can't take yet is sent again when it says; what it can't ever take is that
    image's own failure.
    """

    def __init__(self, service: RemoteService, sampling: dict[str, Any]) -> None:
        """sampling: fields of SamplingParams."""
        self._service, self._sampling = service, sampling
        self.identity, self.at_once = service.identity, service.connections
        self.where = f"{service.model} on {service.url}, {service.connections} at a time"
        self._mine, self._all = threading.local(), list[_Connection]()
        self._over = threading.Event()

    def caption(self, image: bytes, prompt: str | None) -> tuple[Said, ...]:
        """What is said of an image, sent as often as it takes.

        Raises Unfit, and RunFailed when the service is gone for minutes, or wants another key.
        """
        connection = self._connection()
        asked = {"model": self._service.model, "prompt": prompt, "priority": "batch"}
        fields = {k: v for k, v in (asked | self._sampling).items() if v is not None}
        query = {k: str(v).lower() if isinstance(v, bool) else v for k, v in fields.items()}
        path = "/caption?" + urlencode(query)
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                status, retry_after, answer = connection.ask("POST", path, image)
                if status == 200:
                    return _said(answer)
                reason = answer["error"]["message"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                connection.close()
                status, retry_after, reason = _LATER[0], 1.0, repr(error)
            if status in _WRONG_SERVICE:
                raise RunFailed(f"{connection.url}: {reason}")
            if status not in _LATER:
                raise Unfit(reason)
            if time.monotonic() + retry_after > give_up or self._over.wait(retry_after):
                raise RunFailed(f"{connection.url} gave no caption for too long: {reason}")

    def stop(self) -> None:
        """Send nothing again."""
        self._over.set()

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.close()

    def _connection(self) -> "_Connection":
        """This thread's."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = _Connection(self._service.url, self._service.key)
            self._all.append(self._mine.connection)
        return self._mine.connection


def _said(answer: dict[str, Any]) -> tuple[Said, ...]:
    return tuple(
        Said(each["caption"], each["finish_reason"], each["score"])
        for each in (answer, *answer.get("captions", [])[1:])
    )


class _Connection:
    """Kept open from request to request; one thread uses it."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        parts = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._http = kind(parts.hostname or "", parts.port, timeout=_SECONDS)
        self._base = parts.path
        self._headers = {"Content-Type": "application/octet-stream"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, float, dict[str, Any]]:
        """Status, seconds to wait if it is to be asked again, and the JSON that was answered."""
        self._http.request(method, self._base + path, body, self._headers)
        response = self._http.getresponse()
        content = response.read()
        return response.status, float(response.headers.get("Retry-After", 1)), json.loads(content)

    def close(self) -> None:
        """The next request opens a new one."""
        self._http.close()
