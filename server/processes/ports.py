"""The ports of a run: listened on by the supervisor, accepted from by all front-ends.

One socket for all of them means that nobody else can take the port, that clients can connect while
a front-end is replaced, and that a front-end takes the next connection when it has time for it.
"""

import errno
import os
import socket

from runtime.errors import VignetteError
from server.settings import Settings

_BACKLOG = 1024


class CannotListen(VignetteError):
    """The port can't be opened."""


class Ports:
    """Listening sockets: of the public port and, if there is one, of that for health and metrics.

    It can be given to a process that is started, which then has sockets of its own.
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
        """Listen no more."""
        for sock in [*self.public, *self.ops]:
            sock.close()


def _listen(host: str, port: int, setting: str) -> list[socket.socket]:
    """Sockets that listen on a port, one for each address of the host. Raises CannotListen."""
    found: list[socket.socket] = []
    try:
        kinds = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, *_, address in dict.fromkeys(kinds):
            chosen = found[0].getsockname()[1] if found else port
            found.append(
                socket.create_server((address[0], chosen), family=family, backlog=_BACKLOG)
            )
    except OSError as cause:
        for sock in found:
            sock.close()
        reason = os.strerror(cause.errno or 0)
        if isinstance(cause, socket.gaierror) or cause.errno == errno.EADDRNOTAVAIL:
            problem = f"--host {host} is no address of this machine"
        else:
            problem = (
                f"can't listen on {host}:{port} ({reason}): choose another with {setting}, "
                "or stop what uses it"
            )
        raise CannotListen(problem) from cause
    return found
