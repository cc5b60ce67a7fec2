"""Deadlines of requests, in seconds of `time.perf_counter`."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtime.errors import VignetteError


class Expired(VignetteError):
    """The request's deadline passed."""


@asynccontextmanager
async def until(deadline: float | None) -> AsyncIterator[None]:
    """Raise Expired if the block runs past the deadline. None: there is none."""
    left = None if deadline in (None, math.inf) else max(0.0, deadline - time.perf_counter())
    try:
        async with asyncio.timeout(left):
            yield
    except TimeoutError:
        raise Expired("the deadline passed before the caption was there") from None
