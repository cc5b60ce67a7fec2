"""The port that speaks gRPC, on a front-end's own event loop."""

from typing import Any

from runtime.errors import VignetteError
from server.service.service import Service
from server.settings import Settings

_SERVICE = "inference.GRPCInferenceService"
_BESIDE = 64 * 1024  # bytes of a message beside its image
_STREAMS = 128  # at once on one connection
_CALLS = 2048  # at once


class CannotSpeakGrpc(VignetteError):
    """gRPC was asked for, and its packages are missing, or its port or files can't be used."""


class GrpcServer:
    """One that serves."""

    def __init__(self, server: Any, health: Any, states: tuple[Any, Any]) -> None:
        """states: what the standard health service says of a service that serves, or doesn't."""
        self._server, self._health, self._states = server, health, states

    async def tell(self, serves: bool) -> None:
        """What health is to say from now on."""
        for name in ("", _SERVICE):
            await self._health.set(name, self._states[not serves])

    async def stop(self) -> None:
        """Take nothing new, and end what is not over."""
        await self.tell(False)
        await self._server.stop(0)


async def start(service: Service) -> GrpcServer | None:
    """One that serves, or None without --grpc-port. Raises CannotSpeakGrpc."""
    settings = service.settings
    if settings.grpc_port is None:
        return None
    try:
        import grpc
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from server.grpc.service import InferenceService
        from server.grpc.stubs import grpc_service_pb2_grpc
    except ModuleNotFoundError as cause:
        raise CannotSpeakGrpc(
            f"--grpc-port needs {cause.name}: install the grpc extra (pip install -e '.[grpc]')"
        ) from cause
    server = grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", settings.max_body_bytes + _BESIDE),
            ("grpc.max_concurrent_streams", _STREAMS),
            ("grpc.so_reuseport", 1),  # all front-ends listen, and the system shares calls out
        ),
        maximum_concurrent_rpcs=_CALLS,
    )
    grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        InferenceService(service), server
    )
    alive = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(alive, server)
    names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    states = health_pb2.HealthCheckResponse
    started = GrpcServer(server, alive, (states.SERVING, states.NOT_SERVING))
    await started.tell(service.serves)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        _open(server, address, settings)
    except (RuntimeError, OSError) as cause:
        raise CannotSpeakGrpc(f"--grpc-port: can't listen on {address}: {cause}") from cause
    await server.start()
    return started


def _open(server: Any, address: str, settings: Settings) -> None:
    import grpc

    if settings.grpc_certificate is None or settings.grpc_key is None:
        server.add_insecure_port(address)
        return
    pair = settings.grpc_key.read_bytes(), settings.grpc_certificate.read_bytes()
    server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
