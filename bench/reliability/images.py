"""Scenarios: decompression bombs, corrupt and unusual images."""

import asyncio
import io
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from bench.reliability.load import Answer, Clients
from bench.reliability.running import Verdict, get, sample, service
from runtime.model.preprocess import FORMATS


def broken_images(long: bool) -> Verdict:
    """Bombs, mutants of every format, and unusual but valid images."""
    rng = np.random.default_rng(7)
    with service("--timeout-seconds", "60") as it:
        before = it.worker_pid()
        cases = [(n, bomb(side)) for n, side in (("bomb", 19_000), ("bomb", 13_000))]
        cases += [("mutant", m) for m in mutants(rng, 1000 if long else 120)]
        whole = odd_images()

        async def run() -> tuple[list[tuple[str, Answer]], float]:
            clients = Clients(it.url)
            slowest = 0.0
            done = False

            async def watch() -> None:
                """Measure the slowest /health/live: the event loop must not stall."""
                nonlocal slowest
                while not done:
                    start = time.perf_counter()
                    await asyncio.to_thread(get, it.port, "/health/live")
                    slowest = max(slowest, time.perf_counter() - start)
                    await asyncio.sleep(0.02)

            watcher = asyncio.create_task(watch())
            answers = []
            everything = [*cases, *(("whole", image) for image in whole)]
            for start in range(0, len(everything), 8):
                some = everything[start : start + 8]
                found = await asyncio.gather(*(clients.caption(image) for _, image in some))
                answers += [(kind, a) for (kind, _), a in zip(some, found, strict=True)]
            done = True
            await watcher
            return answers, slowest

        answers, slowest = asyncio.run(run())
        wrong = [k for k, a in answers if a.status == 0 or a.status >= 500]
        bombs = {a.status for k, a in answers if k == "bomb"}
        rejected = [k for k, a in answers if k == "whole" and a.status != 200]
        same = it.worker_pid() == before
        return Verdict(
            f"{len(answers)} files: {len(wrong)} answered 5xx or not at all, {len(rejected)} whole "
            f"ones refused, bombs {bombs}, worker untouched: {same}, /health/live within "
            f"{slowest * 1e3:.0f} ms",
            not wrong and not rejected and same and bombs == {422},
        )


def solid(colour: tuple[int, int, int], side: int) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG of side x side black pixels."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def mutants(rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Files of every format, with bytes changed or the end cut off."""
    picture = Image.open(io.BytesIO(sample())).convert("RGB")
    formats = []
    for name in FORMATS:
        buffer = io.BytesIO()
        picture.save(buffer, name)
        formats.append(buffer.getvalue())
    for n in range(count):
        data = bytearray(formats[n % len(formats)])
        if rng.random() < 0.3:
            yield bytes(data[: int(rng.integers(1, len(data)))])
            continue
        for place in rng.integers(0, len(data), int(rng.integers(1, 30))):
            data[place] = int(rng.integers(0, 256))
        yield bytes(data)


def ambiguous(rng: np.random.Generator) -> bytes:
    """A blend of two samples, whose caption a small change of the numbers flips."""
    one, other = (
        Image.open(io.BytesIO(sample(str(name)))).convert("RGB")
        for name in rng.choice(["owl.png", "eagle-shark.png", "donuts.png", "cats.png"], 2, False)
    )
    buffer = io.BytesIO()
    Image.blend(one, other.resize(one.size), rng.uniform(0.3, 0.7)).save(buffer, "PNG")
    return buffer.getvalue()


def odd_images() -> list[bytes]:
    """Valid images of unusual kinds."""
    picture = Image.open(io.BytesIO(sample())).convert("RGB")
    found = []
    for image, name, options in (
        (Image.new("RGB", (1, 1), "red"), "PNG", {}),
        (picture.convert("CMYK"), "JPEG", {}),
        (Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG", {}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture.convert("P"), "PNG", {}),
        (picture.convert("LA"), "PNG", {}),
        (picture.convert("1"), "TIFF", {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        found.append(buffer.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    return [*found, buffer.getvalue()]
