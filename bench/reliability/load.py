"""Clients: closed loops, Poisson arrivals, and one that does not wait for its answer."""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient

from bench.reliability.running import Service, sample


@dataclass(slots=True)
class Answer:
    """Outcome of a request: status (0: no answer), latency in seconds, caption, Retry-After."""

    status: int
    seconds: float
    caption: str | None = None
    retry_after: str | None = None


class Clients:
    """Sends requests from an event loop; made and used within one `asyncio.run`."""

    def __init__(self, url: str, at_once: int = 4096) -> None:
        self._url = url
        self.headers = {"Content-Type": "image/png"}
        self._http: AsyncHTTPClient = SimpleAsyncHTTPClient(
            force_instance=True, max_clients=at_once
        )

    async def caption(self, image: bytes, query: str = "", seconds: float = 90) -> Answer:
        """Post an image; `seconds` is the time-out."""
        start = time.perf_counter()
        try:
            response: HTTPResponse = await self._http.fetch(
                f"{self._url}/caption{query}", method="POST", body=image, raise_error=False,
                request_timeout=seconds, connect_timeout=seconds,
                headers=self.headers,
            )  # fmt: skip
        except (OSError, HTTPTimeoutError, HTTPClientError):
            return Answer(0, time.perf_counter() - start)
        took = time.perf_counter() - start
        if response.code == 200:
            return Answer(200, took, json.loads(response.body)["caption"])
        status = 0 if response.code == 599 else response.code
        return Answer(status, took, retry_after=response.headers.get("Retry-After"))

    async def closed_loop(
        self, image: bytes, count: int, until: Callable[[], bool]
    ) -> list[Answer]:
        """`count` clients, each sending its next request when the last is answered."""
        answers: list[Answer] = []

        async def one() -> None:
            while not until():
                answers.append(await self.caption(image))

        await asyncio.gather(*(one() for _ in range(count)))
        return answers

    async def open_loop(self, image: bytes, rate: float, seconds: float) -> list[Answer]:
        """Poisson arrivals at `rate` requests per second, answered or not."""
        rng, tasks = random.Random(1), []
        start = due = time.perf_counter()
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.caption(image)))
            due += rng.expovariate(rate)
        return await asyncio.gather(*tasks)


def after(seconds: float) -> Callable[[], bool]:
    """A condition that is true once `seconds` have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def counts(answers: list[Answer]) -> Counter[int]:
    """Number of answers by status."""
    return Counter(answer.status for answer in answers)


def abandon(port: int, image: bytes, kind: str = "image/png") -> socket.socket:
    """Send a request; the open socket, its answer unread."""
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    client.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image)
    return client


async def one_caption(it: Service) -> Answer:
    """Send the first sample once."""
    return await Clients(it.url).caption(sample())
