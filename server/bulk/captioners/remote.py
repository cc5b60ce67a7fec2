"""Captioning by a remote service, the counterpart of `server.bulk.captioners.local`."""

import http.client
import threading
import time
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct, convert

from server.bulk.captioners.captioning import RunFailed
from server.bulk.captioners.service_client import LATER, Connection, RemoteService
from server.bulk.inputs.items import ScoredCaption, UnfitItem, rounded

_PATIENCE = 300.0  # seconds without a useful answer, before the run fails
_WRONG_SERVICE = (401, 403, 404, 405, 407)  # answers that every request would get


class RemoteCaptioner:
    """Captions images by a service; each of many threads has a connection of its own.

    An image that the service can't take yet is sent again when the service says; one that it can
    never take fails alone.
    """

    def __init__(self, service: RemoteService, sampling: dict[str, Any]) -> None:
        """sampling: fields of SamplingParams."""
        self._service, self._sampling = service, sampling
        self.identity, self.at_once = service.identity, service.connections
        self.where = f"{service.model} on {service.url}, {service.connections} at a time"
        self._mine, self._all = threading.local(), list[Connection]()
        self._over = threading.Event()
        self._answered = time.monotonic()  # when any image got an answer

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions, retrying as often as it takes.

        Raises UnfitItem, also if only this image is put off for minutes, and RunFailed if the
        service is gone for minutes, or wants another key.
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
                if status not in LATER:
                    self._answered = time.monotonic()
                if status == 200:
                    return self._said(answer)
                reason = answer["error"]["message"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                connection.close()
                status, retry_after, reason = LATER[0], 1.0, repr(error)
            if status in _WRONG_SERVICE:
                raise RunFailed(f"{connection.url}: {reason}")
            if status not in LATER:
                raise UnfitItem(reason)
            if time.monotonic() + retry_after > give_up or self._over.wait(retry_after):
                silent = time.monotonic() - self._answered > _PATIENCE - retry_after
                failure = RunFailed if silent or self._over.is_set() else UnfitItem
                raise failure(f"{connection.url} gave no caption for too long: {reason}")

    def stop(self) -> None:
        """Stop retrying, and waiting for answers."""
        self._over.set()
        for connection in list(self._all):
            connection.abort()

    def close(self) -> None:
        """Close all connections."""
        for connection in self._all:
            connection.close()

    def _connection(self) -> Connection:
        """This thread's connection."""
        if not hasattr(self._mine, "connection"):
            self._mine.connection = Connection(self._service.url, self._service.key, self._over)
            self._all.append(self._mine.connection)
        return self._mine.connection

    def _said(self, answer: dict[str, Any]) -> tuple[ScoredCaption, ...]:
        """All captions of an answer. Raises ValueError, and RunFailed if another engine made it."""
        found = convert(answer, _Answer)
        if found.engine != self._service.engine:
            raise RunFailed(
                f"{self._service.url} captions with another engine now "
                f"({found.engine or 'unknown'}, before {self._service.engine}): name another "
                "output, or caption anew with --again"
            )
        for each in (completions := (found, *found.captions[1:])):
            f"{each.caption}{each.finish_reason}".encode()
        return tuple(
            ScoredCaption(each.caption, each.finish_reason, rounded(each.score))
            for each in completions
        )


class _Completion(Struct):
    caption: str
    finish_reason: str
    score: float | None = None


class _Answer(_Completion, kw_only=True):
    engine: str = ""
    captions: list[_Completion] = []
