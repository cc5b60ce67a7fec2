"""Throughput of other protocols against /caption: the same image, captions and clients."""

import asyncio
import base64
import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
import tritonclient.grpc.aio as triton
from tqdm import tqdm

from bench.common.arithmetic import against
from bench.common.settings import TOKENS, Settings
from bench.contestants.servers import free_port, picture, running, vignette
from bench.load.closed_loop import Ask, caption, rate

_CLIENTS = 16


def measure(settings: Settings) -> dict[str, Any]:
    """Median throughput, in captions per second, of each protocol, in turns; and its share of
    /caption's in the same turn.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        contestant = vignette(settings, "--grpc-port", str(port))
        with running(contestant, image) as url:
            rates = asyncio.run(_measure(url, port, image, settings))
    return {"clients": _CLIENTS} | against(rates, "/caption")


async def _measure(
    url: str, grpc_port: int, image: bytes, settings: Settings
) -> dict[str, list[float]]:
    parts = urlsplit(url)
    base = f"{parts.scheme}://{parts.netloc}"
    async with (
        aiohttp.ClientSession() as http,
        triton.InferenceServerClient(f"127.0.0.1:{grpc_port}") as grpc,
    ):
        async with http.get(f"{base}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        asks: dict[str, Ask] = {
            "/caption": lambda: caption(http, url, image),
            "OpenAI": lambda: _chat(http, base, model, image),
            "Open Inference Protocol, HTTP": lambda: _infer(http, base, model, image),
            "Open Inference Protocol, gRPC": lambda: _grpc(grpc, model, image),
        }
        expected = {await ask() for ask in asks.values()}
        assert len(expected) == 1, f"the protocols caption differently: {expected}"
        rates: dict[str, list[float]] = {name: [] for name in asks}
        for _ in tqdm(range(2 * settings.repeats), desc="protocols", unit="turn"):
            for name, ask in asks.items():
                rates[name].append(await rate(ask, settings.images, _CLIENTS))
    return rates


async def _chat(http: aiohttp.ClientSession, base: str, model: str, image: bytes) -> str:
    url = "data:image/jpeg;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "max_tokens": TOKENS, "messages": messages}
    async with http.post(f"{base}/v1/chat/completions", json=body) as answer:
        return str((await answer.json())["choices"][0]["message"]["content"])


async def _infer(http: aiohttp.ClientSession, base: str, model: str, image: bytes) -> str:
    data = len(image).to_bytes(4, "little") + image
    head = json.dumps({
        "inputs": [
            {"name": "IMAGE", "shape": [1], "datatype": "BYTES",
             "parameters": {"binary_data_size": len(data)}},
            {"name": "MAX_NEW_TOKENS", "shape": [1], "datatype": "INT32", "data": [TOKENS]},
        ],
    }).encode()  # fmt: skip
    headers = {"Inference-Header-Content-Length": str(len(head))}
    url = f"{base}/v2/models/{model}/infer"
    async with http.post(url, data=head + data, headers=headers) as answer:
        return str((await answer.json())["outputs"][0]["data"][0])


async def _grpc(client: triton.InferenceServerClient, model: str, image: bytes) -> str:
    pictures = triton.InferInput("IMAGE", [1], "BYTES")
    pictures.set_data_from_numpy(np.array([image], np.object_))
    tokens = triton.InferInput("MAX_NEW_TOKENS", [1], "INT32")
    tokens.set_data_from_numpy(np.array([TOKENS], np.int32))
    result = await client.infer(model, [pictures, tokens])
    return str(result.as_numpy("CAPTION")[0].decode())
