"""The API keys of a front-end, read again when the supervisor says so."""

import asyncio
import logging
from collections.abc import Callable

from runtime.errors import VignetteError
from server.service.keys import Keys

log = logging.getLogger(__name__)


class KeyReader:
    """keys: as they were read last. Used on the event loop's thread only."""

    def __init__(self, open_keys: Callable[[int], Keys]) -> None:
        """open_keys: reads the checked copy of the file; told how often it was read again. Raises
        InvalidKeys.
        """
        self._open, self.keys = open_keys, open_keys(0)
        self.reading = 0  # how often the file was read again
        self.task: asyncio.Task[None] | None = None

    def read(self, reading: int) -> None:
        """Read again, unless this reading was asked for before. An invalid file is logged. Requests
        inside go on.
        """
        if self.reading != reading:
            self.reading = reading
            if self.task is None or self.task.done():
                self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        """Read on a thread, as many keys take long; once more if asked to meanwhile."""
        reading = -1
        while reading != self.reading:
            reading = self.reading
            try:
                fresh = await asyncio.to_thread(self._open, reading)
            except (VignetteError, OSError) as error:  # OSError: no file or memory is left
                log.error("the API keys stay as they were: %s", error)
            else:
                self.keys.close()
                self.keys = fresh
