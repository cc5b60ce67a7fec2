"""What is measured of Vignette on a GPU: times in seconds, memory in bytes."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import calls
from bench.common.settings import TOKENS, Settings
from bench.common.timing import median_s, pictures
from bench.common.work import encoder_work, step_bytes
from bench.cuda.extent import BEAMS, Extent
from bench.load import arrivals
from bench.load.apache import AB_MISSING
from bench.load.side_by_side import images_per_second
from bench.sections import front_ends
from runtime.engine import Engine
from runtime.execution.device import DeviceRunner
from runtime.model.manifest import UNFORCED
from runtime.planning.config import EngineConfig
from runtime.providers import cuda
from runtime.providers.gpu import require_gpu

ENGINE = Path("engines/random-git-base-cuda")
_DEMO, _SAMPLES = Path("engines/demo"), Path("demo/samples")
_IN_A_ROW = 20  # encoder calls: before the first one the GPU waits for pixels


def encoder(engine: Engine, extent: Extent) -> dict[str, Any]:
    """Encoder seconds per image by batch size, and operations per image. Whole batches follow one
    another, so that the next one's pixels are made ready meanwhile.
    """
    batch = engine.encode_batch
    images = pictures(batch, engine.manifest.sizes.pixels)
    rows = {}
    for count, times in ((1, 1), (batch, _IN_A_ROW)):
        run = partial(calls.encode, engine.runner, images[:count], times)
        rows[count] = median_s(run, 10 * extent.repeats) / count / times
    return {"seconds": rows, "ops": encoder_work()["encoder_flop"], "best": min(rows.values())}


def decoder(engine: Engine, extent: Extent) -> dict[str, Any]:
    """Seconds per decode step of all slots in a burst; bytes of weights and K/V it reads."""
    runner, rows = engine.runner, engine.slots
    assert isinstance(runner, DeviceRunner)
    fed = [TOKENS // 2] * rows
    forced = [[UNFORCED] * rows] * (runner.burst - 1)
    run = partial(calls.decode, runner, [engine.manifest.tokens.bos] * rows, fed, forced)
    return {
        "rows": rows,
        "seconds": median_s(run, 20 * extent.repeats) / runner.burst,
        "bytes": step_bytes(engine, rows),
    }


def offline(engine: Engine, extent: Extent) -> dict[str, Any]:
    """Images per second, all at once, with captions of equal and of COCO's length; seconds for one
    image alone.
    """
    some = pictures(16, engine.manifest.sizes.pixels)
    images = some * (extent.images // 16)
    uneven = arrivals.coco_jobs(some, extent.images)
    all_, one = (
        partial(engine.generate, given, max_new_tokens=TOKENS, ignore_eos=True)
        for given in (images, images[:1])
    )
    return {
        "per_second": len(images) / median_s(all_, extent.repeats),
        "uneven_per_second": len(uneven)
        / median_s(lambda: engine.run(arrivals.requests(engine, uneven)), extent.repeats),
        "uneven_tokens": sum(tokens for _, tokens in uneven) / len(uneven),
        "one": median_s(one, 20 * extent.repeats),
    }


def beams(engine: Engine, extent: Extent) -> dict[str, float]:
    """Images per second with beams and with greedy decoding, of as many images."""
    images = pictures(16, engine.manifest.sizes.pixels) * (extent.images // 16 // BEAMS)

    def rate(**sampling: Any) -> float:
        run = partial(engine.generate, images, max_new_tokens=TOKENS, ignore_eos=True, **sampling)
        return len(images) / median_s(run, extent.repeats)

    return {"greedy": rate(), "searched": rate(num_beams=BEAMS)}


def two_workers(extent: Extent) -> dict[str, float]:
    """Images per second of two engines that share the GPU, and of one in a process like theirs."""
    run = partial(images_per_second, ENGINE, images=extent.images)
    return {"one": run(workers=1), "two": run(workers=2)}


def growth(engine: Engine, extent: Extent) -> dict[str, Any]:
    """Growth of GPU memory in bytes over many batches of mixed sizes."""
    images = pictures(engine.encode_batch, engine.manifest.sizes.pixels)
    rng = np.random.default_rng(0)

    def batch() -> None:
        engine.generate(images[: int(rng.integers(1, len(images) + 1))], max_new_tokens=2)

    for _ in range(50):
        batch()
    before = require_gpu(cuda.major()).free
    for _ in range(extent.batches):
        batch()
    return {"batches": extent.batches, "grown": before - require_gpu(cuda.major()).free}


def samples() -> dict[str, Any]:
    """How many of the demo model's samples are captioned word for word on CUDA."""
    expected = json.loads((_SAMPLES / "captions.json").read_text())
    engine = Engine.open(_DEMO, EngineConfig(provider="cuda"))
    names = sorted(expected)
    captions = engine.generate([(_SAMPLES / name).read_bytes() for name in names])
    right = sum(c.text == expected[n]["caption"] for c, n in zip(captions, names, strict=True))
    return {"right": right, "of": len(names), "runs_on": engine.runs_on}


def taken_in() -> dict[str, Any]:
    """Throughput of the front-ends; the reason it was left out where ab is missing."""
    if shutil.which("ab") is None:
        return {"left_out": AB_MISSING, "rows": []}
    return front_ends.measure(Settings(), "cuda")
