"""TLS of a client, in calls whose length is bounded by the bytes that they are given.

On a socket of its own, OpenSSL reads on for as long as a site sends what is no answer: session
tickets, or requests to begin the handshake anew. And what it computes in a handshake is the site's
choice: a chain of a hundred certificates with curves of its own takes 20 s.
"""

import asyncio
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tornado.iostream import IOStream

_PIECE = 4096  # bytes of a connection that TLS is given at once
_AT_ONCE = (
    5  # pieces without an answer in them, after which others run: a record has at most 16 KiB
)
_HANDSHAKE, _READS = 32 * 1024, 128  # bytes, and reads, of a handshake; usual ones have 3 to 8 KiB
_STEP_SECONDS = 100e-6  # that changing threads takes, at each read of a handshake
_BESIDE = 32 * 1024  # bytes beside the answer, and as many as it has


class NoAnswer(OSError):
    """The site sends more of other things than of an answer, or of a handshake."""


class TlsStream(IOStream):
    """The client's end of a connection on which hands have been shaken."""

    def __init__(self, connection: socket.socket, shaken: "Handshake", **options: Any) -> None:
        super().__init__(connection, **options)
        self._tls, self._incoming = shaken.tls, shaken.incoming
        self._outgoing = shaken.outgoing
        self._received = self._answered = 0

    def read_from_fd(self, buf: bytearray | memoryview) -> int | None:
        """Bytes read; None if there are none now, 0 at the end. Raises SSLError and NoAnswer."""
        pieces = 0
        while True:
            try:
                count: int = self._tls.read(len(buf), buf)  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                if pieces == _AT_ONCE:
                    return None
            except ssl.SSLEOFError:
                return 0
            else:
                self._answered += count
                return count
            _send(self.socket, self._outgoing)
            try:
                piece = self.socket.recv(_PIECE)
            except BlockingIOError:
                return None
            if not piece:
                return 0
            self._received += len(piece)
            if self._received > 2 * self._answered + _BESIDE:
                raise NoAnswer("it sends what is no answer")
            self._incoming.write(piece)
            pieces += 1

    def write_to_fd(self, data: memoryview) -> int:
        """Bytes written: all, as a request is shorter than what a connection holds. Raises OSError
        if it is not.
        """
        try:
            count = self._tls.write(data)
        finally:
            del data  # Tornado resizes the buffer
        _send(self.socket, self._outgoing)
        return count


def _send(connection: socket.socket, outgoing: ssl.MemoryBIO) -> None:
    """Send what TLS has to say. Raises OSError if the connection does not take all of it at once:
    the site asks without reading.
    """
    if piece := outgoing.read():
        try:
            sent = connection.send(piece)
        except BlockingIOError:
            sent = 0
        if sent < len(piece):
            raise OSError("the site does not read what it is sent")


class Handshake:
    """A handshake. Its computations run on threads, at the lowest priority."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=host)
        self.computing: asyncio.Future[None] | None = None  # can't be stopped

    async def shake(
        self,
        connection: socket.socket,
        threads: ThreadPoolExecutor,
        spent: Callable[[float], object],
    ) -> None:
        """Shake hands. spent: called with seconds of computation, on a thread.

        Raises SSLError for a site that can't be trusted, other OSErrors for one that gives up or
        sends too much.
        """

        def step() -> None:
            began = time.thread_time()
            try:
                self.tls.do_handshake()
            finally:
                spent(time.thread_time() - began + _STEP_SECONDS)

        loop, received, done = asyncio.get_running_loop(), 0, False
        for _ in range(_READS):
            self.computing = loop.run_in_executor(threads, step)
            try:
                await asyncio.shield(self.computing)
                done = True
            except ssl.SSLWantReadError:
                pass
            _send(connection, self.outgoing)
            if done:
                return
            piece = await loop.sock_recv(connection, _PIECE)
            if not piece:
                raise ConnectionResetError("it hung up in the TLS handshake")
            received += len(piece)
            if received > _HANDSHAKE:
                break
            self.incoming.write(piece)
        raise NoAnswer("its TLS handshake has no end")


def handshake_threads(most: int) -> ThreadPoolExecutor:
    """Threads on which at most so many handshakes compute, after everything else."""
    return ThreadPoolExecutor(most, "handshake", initializer=_lowest_priority)


def _lowest_priority() -> None:
    if sys.platform == "linux":  # elsewhere it would be the process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
