"""The ports of a run, held while front-ends come and go."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import tornado.netutil

from runtime.errors import VignetteError
from server.settings import Settings


class CannotListen(VignetteError):
    """The port can't be opened."""


@contextmanager
def held_ports(settings: Settings) -> Iterator[tuple[int, int | None]]:
    """Hold the port and, if there is one, the port of metrics and health; nobody else gets them.

    Raises CannotListen.
    """
    with ExitStack() as held:
        wanted = (
            [settings.port] if settings.ops_port is None else [settings.port, settings.ops_port]
        )
        ports = [
            held.enter_context(_reserve(settings.host, port)).getsockname()[1] for port in wanted
        ]
        yield ports[0], ports[1] if len(ports) > 1 else None


def _reserve(host: str, port: int) -> socket.socket:
    """A socket that holds a port without listening; CannotListen if somebody else has it."""
    try:
        # Without SO_REUSEPORT first: with it, another server's port could be shared unseen.
        free = tornado.netutil.bind_sockets(port, host, backlog=1)
        port = free[0].getsockname()[1]
        for sock in free:
            sock.close()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, port))
    except OSError as cause:
        raise CannotListen(
            f"can't listen on {host}:{port} ({cause.strerror}): choose another with --port, or "
            "stop what uses it"
        ) from cause
    return held
