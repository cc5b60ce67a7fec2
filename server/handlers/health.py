"""Health: alive as long as it answers, ready when it captions."""

from server.admission import State
from server.handlers.base import Handler


class LiveHandler(Handler):
    """GET /health/live: the event loop runs."""

    def get(self) -> None:
        """Always 200."""
        self.write_json({"status": "alive"})


class ReadyHandler(Handler):
    """GET /health/ready: 200 once the model is warm and until the server drains."""

    def get(self) -> None:
        """The state, and what serves."""
        state, engine = self.service.admission.state, self.service.engine
        if state is not State.READY or engine is None:
            self.set_status(503)
            self.write_json({"status": state})
            return
        self.write_json(
            {"status": state, "model": engine.manifest.model, "runs_on": engine.runs_on}
        )
