"""Answers that are read until a deadline, however slowly their server sends them."""

import http.client
import io
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from typing_extensions import override

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(slots=True)
class Attempt:
    """An attempt to get an answer. seconds: after which to give it up. silence: most of them
    without a byte. over: set once the answer is not wanted any more.
    """

    seconds: float
    silence: float
    over: threading.Event = field(default_factory=threading.Event)
    end: float = field(init=False)  # of `time.monotonic`

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds


_LOOK_SECONDS = 0.5  # between two looks at whether the answer is still wanted
current = threading.local()  # attempt: that of this thread


class _Timed(io.RawIOBase):
    """Reads a connection within the limits of its thread's attempt."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw, self._connection = raw, connection

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer") -> int | None:
        attempt: Attempt = current.attempt
        end = min(attempt.end, time.monotonic() + attempt.silence)
        while not self._readable(_LOOK_SECONDS):
            if time.monotonic() >= end or attempt.over.is_set():
                raise TimeoutError("it took too long")
        left = end - time.monotonic()
        if left <= 0 or attempt.over.is_set():
            raise TimeoutError("it took too long")
        self._connection.settimeout(left)
        return self._raw.readinto(buffer)

    def _readable(self, seconds: float) -> bool:
        """Wait for bytes: a read that timed out can't be tried again. TLS may hold some already."""
        if isinstance(self._connection, ssl.SSLSocket) and self._connection.pending():
            return True
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        return bool(waiting.poll(1000 * seconds))

    @override
    def close(self) -> None:
        self._raw.close()
        super().close()


class TimedResponse(http.client.HTTPResponse):
    """A response that is read, headers included, within the limits of its thread's attempt."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Timed(self.fp.detach(), sock))
