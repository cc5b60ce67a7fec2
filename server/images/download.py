"""Downloads by libcurl, each on a thread of its own.

A site decides what TLS computes, and in how many pieces an answer comes. libcurl does nearly all of
that work without the interpreter's lock, so that requests don't wait for it; who watches a download
can tell how much it computes, and end it.
"""

import os
import re
import socket
import ssl
import string
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

import pycurl

from runtime.errors import VignetteError
from server.images.hosts import FetchFailed
from server.requests.parts import shown

LATE = "image_url did not answer in time"
_HEAD_BYTES, _HEAD_LINES = 16 * 1024, 200
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2: without numbers of the site's own length
_STATUS = re.compile(rb"HTTP/\S+ (\d{3})")
_AT_ONCE = struct.pack("ii", 1, 0)  # closes by a reset: a site that goes on is not heard
_MORE_FOLLOWS = (100, 102, 103)
_MOVED = (301, 302, 303, 307, 308)


class Download:
    """A download: one answer, and before it those that lead on to it.

    `ask` runs on a thread, one at a time; all else may be called meanwhile from any other.

    size: bytes of the answers that have come, with heads, bodies unpacked.
    """

    def __init__(self, limit: int) -> None:
        """limit: most bytes of an answer."""
        self.size = 0
        self._limit = limit
        self._ended: VignetteError | None = None
        self._connections: list[socket.socket] = []
        self._closing = threading.Lock()  # a closed connection's number may be another's at once
        self._computed = 0.0  # by threads that have ended
        self._thread: tuple[int, int] | None = None  # number of its clock, and its own

    def ask(
        self, curl: pycurl.Curl, url: str, port: int, addresses: Sequence[str],
        connect_seconds: float, seconds: float,
    ) -> "Answer":  # fmt: skip
        """Ask one of the addresses. Raises FetchFailed, or the error that `end` was given."""
        answer = Answer(self._limit)
        if sys.platform == "linux":
            clock = time.pthread_getcpuclockid(threading.get_ident())
            self._thread = clock, threading.get_native_id()
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open(addresses))
        curl.setopt(pycurl.HEADERFUNCTION, answer.take_head)
        curl.setopt(pycurl.WRITEFUNCTION, answer.take)
        try:
            for option, value in _options(url, port, addresses, connect_seconds, seconds).items():
                curl.setopt(option, value)
            curl.perform()
        except pycurl.error as cause:
            if not answer.is_over:
                answer.body = bytearray()  # the error's frames hold the answer
                raise self._ended or FetchFailed(answer.refused or _said(cause)) from cause
        except ValueError as cause:
            raise FetchFailed("image_url is not a URL") from cause
        finally:
            curl.reset()  # which lets go of the answer
            self.size += answer.size
            self._thread = None
            self._computed += time.thread_time()
            with self._closing:
                while self._connections:
                    with suppress(OSError), self._connections.pop() as connection:
                        # libcurl may keep its duplicate until its next use.
                        connection.shutdown(socket.SHUT_RDWR)
        if self._ended is not None:  # what has come may look like all
            raise self._ended
        return answer

    def _open(self, addresses: Sequence[str]) -> Callable[[int, Any], socket.socket | int]:
        def opened(purpose: int, address: Any) -> socket.socket | int:
            if address.addr[0] not in addresses:
                return int(pycurl.SOCKET_BAD)
            connection = socket.socket(address.family, address.socktype, address.protocol)
            self._connections.append(connection)  # libcurl has a duplicate
            return connection if self._ended is None else int(pycurl.SOCKET_BAD)

        return opened

    def end(self, error: VignetteError) -> None:
        """End the download with this error, unless it was ended before."""
        self._ended = self._ended or error
        with self._closing:
            for connection in self._connections:
                with suppress(OSError):  # it has ended, or not begun
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def computed(self) -> float:
        """Seconds of a core that it has taken so far; on systems other than Linux, of the answers
        that have come.
        """
        before = self._computed  # read first: a thread that ends is in it then, or has a clock
        if (thread := self._thread) is not None:
            with suppress(OSError):  # it has just ended
                return before + time.clock_gettime(thread[0])
        return before

    def compute_last(self) -> None:
        """Let its thread compute only what others leave: in a call of TLS, it can't be stopped."""
        if (thread := self._thread) is not None:
            with suppress(OSError):  # it has just ended
                os.setpriority(os.PRIO_PROCESS, thread[1], 19)


class Answer:
    """An answer that comes. refused: why the rest of it is not taken."""

    def __init__(self, limit: int) -> None:
        self.body = bytearray()
        self.location: str | None = None  # to which it leads on
        self.size = 0
        self.refused: str | None = None
        self.is_over = False  # it leads on: nothing more of it is wanted
        self._limit, self._lines, self._status, self._is_headed = limit, 0, 0, False

    def take_head(self, line: bytes) -> int:
        """Take a line of a head, the answer's or one before; -1 for one too much."""
        self.size += len(line)
        self._lines += 1
        if self._lines > _HEAD_LINES or self.size - len(self.body) > _HEAD_BYTES:
            self.refused = "image_url answers with too long a head"
            return -1
        if found := _STATUS.match(line):
            self._status, self.location = int(found[1]), None
            return len(line)
        name, _, value = line.partition(b":")
        if name.lower() == b"location" and not self._is_headed:  # else it is in a trailer
            self.location = value.strip().decode(errors="surrogateescape")
        if not line.strip() and self._status not in _MORE_FOLLOWS:
            return self._headed(len(line))
        return len(line)

    def _headed(self, taken: int) -> int:
        self._is_headed = True
        if self._status in _MOVED and self.location is not None:
            self.is_over = True
            return -1
        self.location = None
        if self._status != 200:
            self.refused = f"image_url answered {self._status}"
            return -1
        return taken

    def take(self, piece: bytes) -> int:
        """Take a piece of the body; -1 for one too much."""
        self.size += len(piece)
        if len(self.body) + len(piece) > self._limit:
            self.refused = f"image_url leads to more than {self._limit} bytes"
            return -1
        self.body += piece
        return len(piece)


def _options(
    url: str, port: int, addresses: Sequence[str], connect_seconds: float, seconds: float
) -> dict[int, Any]:
    parts = urlsplit(url)  # without line breaks and spaces before it
    numbers = ",".join(f"[{each}]" if ":" in each else each for each in addresses)
    return {
        pycurl.URL: quote(parts.geturl(), string.punctuation, errors="surrogateescape"),
        pycurl.PORT: port,
        pycurl.RESOLVE: [f"+{parts.hostname}:{port}:{numbers}"],  # for a minute
        pycurl.PROTOCOLS: pycurl.PROTO_HTTPS,
        pycurl.PROXY: "",
        pycurl.NOSIGNAL: 1,
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.USERAGENT: "Vignette",
        pycurl.ACCEPT_ENCODING: "gzip, deflate",  # some sites pack unasked
        pycurl.CONNECTTIMEOUT_MS: _milliseconds(connect_seconds),
        pycurl.TIMEOUT_MS: _milliseconds(seconds),
        pycurl.FORBID_REUSE: 1,
        pycurl.SSL_SESSIONID_CACHE: 0,
        pycurl.SSL_CIPHER_LIST: _CIPHERS,
        **_trusted(),
    }


def _trusted() -> dict[int, str]:
    """Certificates as Python finds them. libcurl reads a file once for each handle; a folder's, for
    each download.
    """
    found = ssl.get_default_verify_paths()
    file = {pycurl.CAINFO: found.cafile} if found.cafile else {}
    if found.capath and (not file or found.openssl_capath_env in os.environ):
        return {**file, pycurl.CAPATH: found.capath}
    return file


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1e3))  # 0 would be without end


def _said(error: pycurl.error) -> str:
    code, message = error.args
    if code == pycurl.E_OPERATION_TIMEDOUT:
        return LATE
    return f"image_url can't be fetched: {shown(message)}"
