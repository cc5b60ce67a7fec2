"""Throughput of the front-ends in images per second: JPEGs of 640x480, decoded and resized.

The demo engine's captions cost little, so HTTP and decoding dominate. The bound is the decoding
rate of the cores (the section `images` has it for one core).
"""

import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common.settings import Settings
from bench.contestants.servers import PICTURE, Contestant, picture, running
from bench.load.apache import all_answered
from runtime.planning.machine import this_machine

_CLIENTS = 64
_COUNTS = (1, 2, 4, 8, 12)
_DEMO = Path("engines/demo")


def measure(settings: Settings, provider: str = "auto") -> dict[str, Any]:
    """Images per second by number of front-ends, at most as many as there are cores."""
    rows = []
    counts = [count for count in _COUNTS if count <= this_machine().cores]
    with tempfile.TemporaryDirectory() as name:
        image = picture(Path(name))
        for count in tqdm(counts, desc="front-ends", unit="count"):
            contestant = Contestant(
                f"{count} front-ends",
                ("-m", "server", "--engine", str(_DEMO), "--port", "{port}", "--provider", provider,
                 "--front-ends", str(count), "--max-queue", "4096"),
                tokens=None,
            )  # fmt: skip
            with running(contestant, image) as url:
                rate = all_answered(url, Path(name, PICTURE), 32 * settings.images, _CLIENTS)
                rows.append({"front_ends": count, "per_second": rate})
    return {"cores": this_machine().cores, "rows": rows}
