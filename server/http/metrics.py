"""GET /metrics for Prometheus."""

from server.http.handler import Handler
from server.metrics import CONTENT_TYPE


class MetricsHandler(Handler):
    """All metrics of this server."""

    async def get(self) -> None:
        """Text in Prometheus' format."""
        self.set_header("Content-Type", CONTENT_TYPE)
        await self.paced()  # adding up the files takes milliseconds
        self.finish(self.service.metrics.render())
