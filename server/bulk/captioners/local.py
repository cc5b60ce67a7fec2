"""Captioning by an engine on this machine."""

from typing import Any

from runtime.planning.machine import this_machine
from server.bulk.captioners.decoding import BulkDecoders
from server.bulk.captioners.engine import BulkEngine, EngineSetup
from server.bulk.inputs.items import ScoredCaption


class LocalCaptioner:
    """Decodes and captions on this machine."""

    def __init__(
        self, setup: EngineSetup, prompt: str | None, sampling: dict[str, Any], max_pixels: int
    ) -> None:
        """sampling: fields of SamplingParams. Raises what BulkEngine raises."""
        self._engine = engine = BulkEngine(setup, prompt, sampling)
        self.identity, self.where = engine.identity, engine.facts.runs_on
        self.at_once = 2 * engine.facts.slots
        try:
            self._decoding = BulkDecoders(engine.manifest, this_machine().cores, max_pixels)
        except BaseException:
            engine.close()
            raise

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        """An image's captions. Raises VignetteError if this image can't be captioned, and
        RunFailed.
        """
        return self._engine.caption(self._decoding.pixels(image), prompt)

    def stop(self) -> None:
        """No-op: there are no retries to stop."""

    def close(self) -> None:
        """End all processes."""
        try:
            self._decoding.close()
        finally:
            self._engine.close()
