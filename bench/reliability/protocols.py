"""Scenarios: the worker is killed under streams and gRPC calls."""

import asyncio
import itertools
import json
import os
import signal
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable

import aiohttp
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from bench.contestants.servers import free_port
from bench.reliability.running import Verdict, said, sample, service

_EACH = 2  # clients of each protocol
MODEL = "vignette-demo"
Ask = Callable[[], Awaitable[str]]


def killed_under_streams(long: bool) -> Verdict:
    """SIGKILL the worker again and again, with streams and gRPC calls in flight."""
    times, port = 20 if long else 3, free_port()
    with service("--grpc-port", str(port)) as it:

        async def kill() -> None:
            for _ in range(times):
                await asyncio.sleep(1.0)
                pid = await asyncio.to_thread(it.worker_pid)
                os.kill(pid, signal.SIGKILL)
                while await asyncio.to_thread(it.worker_pid) == pid:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(1.0)

        found = asyncio.run(_asked_until(kill(), it.url, port))
    wrong = {kind: sum(a != "right" for a in answers) for kind, answers in found.items()}
    figures = (f"{wrong[kind]} of {len(answers)} {kind}" for kind, answers in found.items())
    kinds = Counter(a for answers in found.values() for a in answers if a != "right")
    first = f" ({next(iter(kinds))})" if kinds else ""
    return Verdict(f"{times} kills: wrong or failed {', '.join(figures)}{first}", not kinds)


async def _asked_until(over: Awaitable[None], url: str, grpc_port: int) -> dict[str, list[str]]:
    """Ask with clients of each kind until `over`; each answer is "right", or what was wrong."""
    async with (
        aiohttp.ClientSession() as http,
        client(grpc_port) as grpc,
    ):
        await ready(grpc)
        kinds: dict[str, Ask] = {
            "streams": lambda: stream(http, url),
            "chat streams": lambda: _chat_stream(http, url),
            "gRPC calls": lambda: call(grpc),
            "gRPC streams": lambda: _grpc_stream(grpc),
        }
        found: dict[str, list[str]] = {kind: [] for kind in kinds}
        ended = asyncio.Event()

        async def asking(kind: str) -> None:
            while not ended.is_set():
                try:
                    found[kind].append(await kinds[kind]())
                except (aiohttp.ClientError, InferenceServerException, ValueError) as error:
                    found[kind].append(f"{type(error).__name__}: {error}")

        clients = [asyncio.create_task(asking(kind)) for kind in kinds for _ in range(_EACH)]
        await over
        ended.set()
        await asyncio.gather(*clients)
        return found


def client(port: int) -> triton.InferenceServerClient:
    """Triton's client, for a port of this machine."""
    return triton.InferenceServerClient(f"127.0.0.1:{port}")


async def ready(grpc: triton.InferenceServerClient) -> None:
    """Wait for gRPC, whose process is another than the one `service` has waited for."""
    while True:
        try:
            if await grpc.is_server_ready():
                return
        except InferenceServerException:  # it does not listen yet
            pass
        await asyncio.sleep(0.05)


def _judged(texts: list[str], whole: str) -> str:
    """Return "right" if each text extends the one before and the last is the caption, else why."""
    grown = all(later.startswith(text) for text, later in itertools.pairwise(texts))
    if whole == said() and grown and texts and texts[-1] == whole:
        return "right"
    return f"{whole!r} after {texts}"


async def stream(http: aiohttp.ClientSession, url: str) -> str:
    """One streamed caption: "right", or what was wrong."""
    headers = {"Accept": "text/event-stream", "Content-Type": "image/png"}
    texts, whole = [], ""
    async with http.post(f"{url}/caption", data=sample(), headers=headers) as answer:
        async for line in answer.content:
            if line.startswith(b"data: "):
                news = json.loads(line[6:])
                if "text" in news:
                    texts.append(news["text"])
                whole = news.get("caption", whole)
    return _judged(texts, whole)


async def _chat_stream(http: aiohttp.ClientSession, url: str) -> str:
    image = {"url": "data:image/png;base64," + b64encode(sample()).decode()}
    content = [{"type": "image_url", "image_url": image}]
    messages = [{"role": "user", "content": content}]
    body = {"model": MODEL, "stream": True, "messages": messages}
    pieces = []
    async with http.post(f"{url}/v1/chat/completions", json=body) as answer:
        async for line in answer.content:
            if line.startswith(b"data: {"):
                news = json.loads(line[6:])
                pieces += [c["delta"].get("content") or "" for c in news.get("choices", [])]
    text = "".join(pieces)
    return "right" if text == said() else repr(text)


def _image() -> triton.InferInput:
    made = triton.InferInput("IMAGE", [1], "BYTES")
    made.set_data_from_numpy(np.array([sample()], np.object_))
    return made


async def call(grpc: triton.InferenceServerClient) -> str:
    """One caption over gRPC: "right", or what was wrong."""
    result = await grpc.infer(MODEL, [_image()])
    text = result.as_numpy("CAPTION")[0].decode()
    return "right" if text == said() else repr(text)


async def _grpc_stream(grpc: triton.InferenceServerClient) -> str:
    async def requests():  # type: ignore[no-untyped-def]
        yield {"model_name": MODEL, "inputs": [_image()]}

    texts: list[str] = []
    async for result, error in grpc.stream_infer(requests()):
        if error is not None:
            return str(error)
        texts.append(result.as_numpy("CAPTION")[0].decode())
    return _judged(texts, texts[-1] if texts else "")
