"""Captions of image files by a service elsewhere, as `runtime.offline.files` makes them here.

Each of many threads sends one image at a time over a connection of its own. What the service can't
take yet is sent again when it says; what it can't ever take is that image's own failure.
"""

import http.client
import json
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.parse import urlencode, urlsplit

from runtime.errors import VignetteError
from runtime.offline.files import Outcome
from runtime.request import Caption, FinishReason, Timing

_MOST_CONNECTIONS = 256
_SECONDS = 120.0  # for one answer
_PATIENCE = 300.0  # seconds without an answer of any use, before all is given up
_IDENTITY = ("model", "engine", "precision")
_LATER = (429, 503, 504)
_WRONG_SERVICE = (401, 404, 405)  # whatever is sent, it will answer that


class ServiceFailed(VignetteError):
    """The service can't be reached, is none of ours, or wants a key."""


class NoCaption(VignetteError):
    """What the service says is wrong with one image."""


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
                slots = sum(worker.get("slots", 0) for worker in workers)
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


def caption_remotely(
    service: RemoteService,
    files: Iterable[Path],
    prompt: str | None = None,
    **sampling: Any,
) -> Iterator[Outcome]:
    """Each file with its caption, or with what was wrong with it, in the order they finish.

    sampling: fields of SamplingParams. Raises ServiceFailed when the service is gone for minutes,
    or wants another key.
    """
    asked = {"model": service.model, "prompt": prompt, "priority": "batch", **sampling}
    path = "/caption?" + urlencode(
        {k: str(v).lower() if isinstance(v, bool) else v for k, v in asked.items() if v is not None}
    )
    remaining, taking, stop = iter(files), threading.Lock(), threading.Event()
    outcomes: Queue[Outcome | Exception | None] = Queue(2 * service.connections)

    def work() -> None:
        try:
            with _Connection(service.url, service.key) as connection:
                while not stop.is_set():
                    with taking:
                        file = next(remaining, None)
                    if file is None:
                        break
                    outcomes.put((file, _captioned(connection, path, file, stop)))
            outcomes.put(None)
        except Exception as error:
            outcomes.put(error)

    for _ in range(service.connections):
        threading.Thread(target=work, daemon=True).start()
    try:
        working = service.connections
        while working:
            outcome = outcomes.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                working -= 1
            else:
                yield outcome
    finally:
        stop.set()


def _captioned(
    connection: "_Connection", path: str, file: Path, stop: threading.Event
) -> Caption | Exception:
    """One image, as often as it takes; raises ServiceFailed when that was too long."""
    try:
        image = file.read_bytes()
    except OSError as error:
        return error
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            status, retry_after, answer = connection.ask("POST", path, image)
            if status == 200:
                return _caption(answer)
            reason = answer["error"]["message"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            connection.close()
            status, retry_after, reason = _LATER[0], 1.0, repr(error)
        if status in _WRONG_SERVICE:
            raise ServiceFailed(f"{connection.url}: {reason}")
        if status not in _LATER:
            return NoCaption(reason)
        if time.monotonic() + retry_after > give_up or stop.wait(retry_after):
            raise ServiceFailed(f"{connection.url} gave no caption for too long: {reason}")


def _caption(answer: dict[str, Any]) -> Caption:
    usage, seconds = answer["usage"], {k: v / 1e3 for k, v in answer["timing_ms"].items()}
    timing = Timing(*(seconds[stage] for stage in ("queue", "encode", "decode", "preprocess")))

    def caption(said: dict[str, Any], others: tuple[Caption, ...] = ()) -> Caption:
        return Caption(
            text=said["caption"],
            token_ids=(),  # they stay there
            finish_reason=FinishReason(said["finish_reason"]),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            timing=timing,
            score=said["score"],
            others=others,
        )

    return caption(answer, tuple(map(caption, answer.get("captions", [])[1:])))


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
