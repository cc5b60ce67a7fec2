"""Clients of asyncio that each send the next request when the last is answered."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

Ask = Callable[[], Awaitable[Any]]


async def rate(ask: Ask, count: int, clients: int) -> float:
    """Answers a second, of so many requests together."""
    left = iter(range(count))

    async def client() -> None:
        for _ in left:  # all clients share it
            await ask()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - started)


async def caption(http: aiohttp.ClientSession, url: str, image: bytes) -> str:
    """What a service says of a JPEG. url: with path and query. Raises RuntimeError if nothing."""
    async with http.post(url, data=image, headers={"Content-Type": "image/jpeg"}) as answer:
        body = await answer.json()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {body}")
    return str(body["caption"])
