"""The gRPC port, on the event loop of a front-end that has no other port."""

import logging
from collections.abc import Callable
from typing import Any

from server.service.service import Service
from server.settings import InvalidSettings, Settings
from server.telemetry.logs import RateLimitedLog

log = logging.getLogger(__name__)

_SERVICE = "inference.GRPCInferenceService"
_BESIDE = 64 * 1024  # bytes of a message besides its image
_CALLS = 4096  # at once, far above the limits of `Bounds`: grpc refuses all further calls
_STREAMS = 128  # calls at once on one connection
_IDLE_MS, _AGE_MS = 120_000, 3_600_000  # of a connection, after which its client opens another
_IDENTITY = 1  # no compression: received messages are as large as they are counted


class GrpcServer:
    """A running gRPC server."""

    def __init__(self, server: Any, tell: Callable[[bool], object]) -> None:
        """tell: sets whether the health service says that this serves."""
        self._server, self.tell = server, tell

    async def stop(self) -> None:
        """Refuse new calls, and abort those in progress."""
        await self._server.stop(0)


async def start(service: Service) -> GrpcServer:
    """Start the server on the settings' port. Raises InvalidSettings."""
    settings = service.settings
    try:
        import grpc
        from grpc_health.v1 import health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from server.grpc import health
        from server.grpc.bounds import Bounds
        from server.grpc.service import CAPTIONING, handlers
    except ModuleNotFoundError as cause:
        raise InvalidSettings(
            f"--grpc-port needs {cause.name}: install the grpc extra (pip install -e '.[grpc]')"
        ) from cause
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", settings.max_body_bytes + _BESIDE),
            ("grpc.max_concurrent_streams", _STREAMS),
            ("grpc.max_connection_idle_ms", _IDLE_MS),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.compression_enabled_algorithms_bitset", _IDENTITY),
            ("grpc.so_reuseport", 0),
        ),
        maximum_concurrent_rpcs=_CALLS,
        interceptors=[Bounds(service, frozenset(f"/{_SERVICE}/{name}" for name in CAPTIONING))],
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(_SERVICE, handlers(service))]
    )
    seldom = RateLimitedLog(log)  # clients can cause any number of grpc's messages
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda r: not r.name.startswith("grpc") or seldom.due(str(r.msg)))
    alive = health.Health([_SERVICE], settings.body_seconds)
    health_pb2_grpc.add_HealthServicer_to_server(alive, server)
    names = (_SERVICE, health.SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    alive.tell(service.serves)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        _open(server, address, settings)
    except (RuntimeError, OSError) as cause:
        raise InvalidSettings(f"--grpc-port: can't listen on {address}: {cause}") from cause
    await server.start()
    return GrpcServer(server, alive.tell)


def _open(server: Any, address: str, settings: Settings) -> None:
    import grpc

    if settings.grpc_certificate is None or settings.grpc_key is None:
        server.add_insecure_port(address)
        return
    pair = settings.grpc_key.read_bytes(), settings.grpc_certificate.read_bytes()
    server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
