"""Closed-loop load over HTTP by asyncio clients."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

Ask = Callable[[], Awaitable[Any]]


async def rate(ask: Ask, count: int, clients: int) -> float:
    """Throughput in answers per second of `count` requests, shared by all clients."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:  # shared by all clients
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - started)


async def caption(http: aiohttp.ClientSession, url: str, image: bytes) -> str:
    """A service's caption of a JPEG. url: with path and query. Raises RuntimeError if not 200."""
    async with http.post(url, data=image, headers={"Content-Type": "image/jpeg"}) as answer:
        body = await answer.json()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body}")
    return str(body["caption"])
