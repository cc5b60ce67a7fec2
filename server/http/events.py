"""A caption as server-sent events: one for each token, and one with all that the JSON answer holds.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import AsyncIterator
from typing import Any

from runtime.errors import VignetteError
from runtime.request import RequestOutput
from server.http.intake import IntakeHandler
from server.service.model import Model
from server.streams import growing


class EventStream:
    """What is written to a client that reads along."""

    def __init__(self, handler: IntakeHandler, model: Model) -> None:
        self._handler, self._model = handler, model

    async def tell(self, outputs: AsyncIterator[RequestOutput]) -> RequestOutput | None:
        """An event for each token; returns all that was generated once the last has come.

        Raises a VignetteError that comes before the first event. One that comes later is an event,
        too, and the answer is over: None.
        """
        whole: RequestOutput | None = None
        try:
            async for news in growing(outputs, self._model.tokenizer):
                whole = news.whole
                if news.completion.token_ids:
                    self.send("token", {"text": news.text, "tokens": news.tokens})
        except VignetteError as error:
            if not self._handler.streams:
                raise
            self.send("error", self._handler.failed(error))
            self._handler.finish()
        return whole

    def send(self, event: str, content: dict[str, Any]) -> None:
        """Write one."""
        data = json.dumps(content, ensure_ascii=False)
        self._handler.send(f"event: {event}\ndata: {data}\n\n")
