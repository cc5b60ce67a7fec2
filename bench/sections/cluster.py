"""The cost of Ray: the service on this machine, and as one replica on a single-node cluster."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from bench.common.arithmetic import against
from bench.common.settings import Settings
from bench.contestants.servers import picture, running, vignette
from bench.load.closed_loop import caption, rate

_CLIENTS = 16
_KINDS = {
    "vignette serve": (),
    "vignette serve --ray": ("--ray", "--ray-replicas", "1"),
}  # fmt: skip


def measure(settings: Settings) -> dict[str, Any]:
    """Median throughput, in captions per second, of each kind, started anew in each turn; and its
    share of the same turn's throughput without Ray.
    """
    rates: dict[str, list[float]] = {name: [] for name in _KINDS}
    with tempfile.TemporaryDirectory() as folder:
        image = picture(Path(folder))
        for _ in tqdm(range(settings.repeats), desc="cluster", unit="turn"):
            for name, flags in _KINDS.items():
                with running(vignette(settings, *flags), image) as url:
                    rates[name].append(asyncio.run(_rate(url, image, settings.images)))
    return {"clients": _CLIENTS} | against(rates, "vignette serve")


async def _rate(url: str, image: bytes, count: int) -> float:
    async with aiohttp.ClientSession() as http:

        async def ask() -> str:
            return await caption(http, url, image)

        await rate(ask, _CLIENTS, _CLIENTS)  # to warm up
        return await rate(ask, 2 * count, _CLIENTS)
