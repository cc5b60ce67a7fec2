"""`vignette caption` against the engine alone: what reading, decoding and writing cost."""

import statistics
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common.settings import TOKENS, Settings
from bench.common.timing import seconds
from bench.sections.images import jpeg
from runtime.engine import Engine
from runtime.model.preprocess import MAX_PIXELS, preprocess
from server.bulk.captioners.captioning import Captioning, CaptioningOptions
from server.bulk.captioners.engine import EngineSetup
from server.bulk.captioners.local import LocalCaptioner
from server.bulk.inputs.kept import Kept
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts
from server.bulk.outputs.opening import open_output
from server.bulk.run import BulkRun, CaptionSettings

_OUTPUTS = ("rows.jsonl", "rows.csv", "rows.parquet", "rows.tar", "texts/")
_SAMPLING: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True}
_SIZE = 640, 480
_LONG = 3  # times `settings.images`: the first images are decoded while the engine idles
_MORE = 2  # turns more than `repeats`: the shares are near their bar, and timings vary
_LIMIT = 10**8  # bytes per image


def measure(settings: Settings) -> dict[str, Any]:
    """Median throughput, in images per second, of each output, in turns with the engine alone on
    decoded images; each output's share is of the engine's runs just before and after it.
    """
    image, count = jpeg(*_SIZE), _LONG * settings.images
    engine = Engine.open(settings.engine)
    pixels = [preprocess(image, engine.manifest.preprocessing)] * count
    rates: dict[str, list[float]] = {name: [] for name in ("engine", *_OUTPUTS)}
    shares: dict[str, list[float]] = {name: [] for name in _OUTPUTS}
    setup = EngineSetup(settings.engine)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(LocalCaptioner(setup, None, _SAMPLING, MAX_PIXELS)) as captioner,
    ):
        photos = Path(folder, "photos")
        photos.mkdir()
        for number in range(count):
            (photos / f"{number}.jpg").write_bytes(image)
        _run(captioner, photos, f"{folder}/first.jsonl")  # warm-up: starts its decoder processes
        alone = partial(engine.generate, pixels, **_SAMPLING)
        own = seconds(alone)
        for turn in tqdm(range(settings.repeats + _MORE), desc="bulk", unit="turn"):
            for name in _OUTPUTS:
                ours = seconds(partial(_run, captioner, photos, f"{folder}/{turn}-{name}"))
                before, own = own, seconds(alone)
                rates["engine"].append(count / own)
                rates[name].append(count / ours)
                shares[name].append((before + own) / 2 / ours)
    return {
        "images": count,
        "rates": {name: statistics.median(found) for name, found in rates.items()},
        "shares": {"engine": 1.0, **{name: statistics.median(s) for name, s in shares.items()}},
    }


def _run(captioner: LocalCaptioner, photos: Path, output: str) -> None:
    with closing(open_output(output, overwrite=False)) as opened:
        job = BulkRun(opened, CaptionSettings("bench", captioner.identity))
        job.read()
        found = Captioning(captioner, CaptioningOptions(_LIMIT), Kept()).run(
            job.left(items(parts([str(photos)], Columns(), _LIMIT)))
        )
        told = job.write(found, lambda told: None)
    assert not told.failed
