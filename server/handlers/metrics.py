"""GET /metrics for Prometheus."""

import asyncio

from server.handlers.base import Handler
from server.metrics import CONTENT_TYPE


class MetricsHandler(Handler):
    """All metrics of this server."""

    async def get(self) -> None:
        """Text in Prometheus' format."""
        self.set_header("Content-Type", CONTENT_TYPE)
        # Adding up the files takes milliseconds: who asks all the time is paced.
        await asyncio.sleep(self.service.refusals.wait(self.client))
        self.finish(self.service.metrics.render())
