"""Liveness and readiness."""

from server.http.answers import ReadyAnswer, worker_answer
from server.http.handler import Handler
from server.service.admission import State


class LiveHandler(Handler):
    """GET /health/live: the event loop runs."""

    async def get(self) -> None:
        """Always 200."""
        await self.paced()
        self.write_json({"status": "alive"})


class ReadyHandler(Handler):
    """GET /health/ready: 200 once all models have served, while any serves, until draining."""

    async def get(self) -> None:
        """The state of the server, of each model and of each worker."""
        await self.paced()
        service = self.service
        if not service.serves:
            self.set_status(503)
        recovering = service.state is State.READY and not service.serves
        models = {name: model.status for name, model in service.models.items()}
        workers = [worker_answer(worker) for worker in service.workers]
        status = "recovering" if recovering else service.state
        self.write_json(ReadyAnswer(status, models, workers))
