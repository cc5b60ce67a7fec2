"""The ports of a run: the supervisor listens, all front-ends accept.

With one socket for all front-ends, no other program can take the port, clients can connect while a
front-end is replaced, and a front-end accepts the next connection when it has time.
"""

import errno
import os
import socket

from runtime.errors import VignetteError
from server.settings import Settings

_BACKLOG = 1024
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class CannotListen(VignetteError):
    """The port can't be opened."""


class Ports:
    """Listening sockets of the public port and, if set, of the port for health and metrics.

    Can be passed to a process that is being started, which gets duplicates of the sockets.
    """

    def __init__(self, settings: Settings) -> None:
        """Listen. Raises CannotListen."""
        ops = settings.ops_port
        self.public = _listen(settings.host, settings.port, "--port")
        self.ops = [] if ops is None else _listen(settings.host, ops, "--ops-port")

    @property
    def number(self) -> int:
        """The public port's number."""
        return self.public[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening."""
        for sock in [*self.public, *self.ops]:
            sock.close()


def _listen(host: str, port: int, setting: str) -> list[socket.socket]:
    """Sockets that listen on a port, one for each address of the host. Raises CannotListen."""
    found: list[socket.socket] = []
    nowhere = CannotListen(f"--host {host} is no address of this machine")
    try:
        kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(kinds):
            where = address[0], found[0].getsockname()[1] if found else port
            try:
                found.append(socket.create_server(where, family=family, backlog=_BACKLOG))
            except OSError as cause:  # a name may have an IPv6 address where that is switched off
                if cause.errno not in _ABSENT:
                    raise
    except (socket.gaierror, UnicodeError) as cause:  # the latter for a name that is none
        raise nowhere from cause
    except OSError as cause:
        for sock in found:
            sock.close()
        raise CannotListen(
            f"can't listen on {host}:{port} ({os.strerror(cause.errno or 0)}): choose another with "
            f"{setting}, or stop what uses it"
        ) from cause
    if not found:
        raise nowhere
    return found
