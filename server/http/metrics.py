"""GET /metrics for Prometheus."""

from server.http.handler import Handler
from server.telemetry.metrics import CONTENT_TYPE

_PAGES = 4  # cost of a request, as its answer is large


class MetricsHandler(Handler):
    """All metrics of this server."""

    async def get(self) -> None:
        """Text in Prometheus' format."""
        self.set_header("Content-Type", CONTENT_TYPE)
        await self.paced(_PAGES)
        self.finish(await self.service.metrics.rendered())
