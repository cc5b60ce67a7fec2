"""Health: alive as long as it answers, ready when it captions."""

from typing import Any

from msgspec import to_builtins

from server.http.handler import Handler
from server.ipc.messages import WorkerState
from server.service.admission import State


def _shown(worker: WorkerState) -> dict[str, Any]:
    """As people read it."""
    fields = to_builtins(worker)
    del fields["epoch"]
    facts = fields.pop("facts") or {}
    return fields | facts


class LiveHandler(Handler):
    """GET /health/live: the event loop runs."""

    async def get(self) -> None:
        """Always 200."""
        await self.paced()
        self.write_json({"status": "alive"})


class ReadyHandler(Handler):
    """GET /health/ready: 200 while a worker serves, until the server drains."""

    async def get(self) -> None:
        """The state, and each worker's."""
        await self.paced()
        state, workers = self.service.admission.state, self.service.workers
        serves = state is State.READY and self.service.serves
        if not serves:
            self.set_status(503)
        self.write_json(
            {
                "status": "recovering" if state is State.READY and not serves else state,
                "model": self.service.manifest.model,
                "workers": [_shown(worker) for worker in workers],
            }
        )
