"""The standard health service. grpc's own writes while it holds a lock: one client that takes no
answer would keep all others, and whoever tells of a change, waiting.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.grpc.calls import Context

SERVICE = "grpc.health.v1.Health"
_States = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):
    """Says of all services alike whether they serve."""

    def __init__(self, services: Iterable[str], seconds: float) -> None:
        """services: known names. seconds: for a watcher to take a state."""
        self._services, self._seconds = {"", *services}, seconds
        self._serves, self._changed = False, asyncio.Event()

    def tell(self, serves: bool) -> None:
        """What is answered from now on; watchers are told of a change."""
        if serves != self._serves:
            self._serves = serves
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The state of a service, NOT_FOUND for an unknown name."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service here")
        return self._state(request.service)

    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """The state, and each change of it. Raises TimeoutError if one is not taken in time."""
        while True:
            changed = self._changed
            async with asyncio.timeout(self._seconds):
                await context.write(self._state(request.service))
            await changed.wait()

    def _state(self, service: str) -> Any:
        if service not in self._services:
            return _States(status=_States.SERVICE_UNKNOWN)
        return _States(status=_States.SERVING if self._serves else _States.NOT_SERVING)
