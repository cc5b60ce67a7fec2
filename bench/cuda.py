"""`make gpu-check` and `make benchmark DEVICE=cuda`: the GPU path, measured and held to its bars.

Both sides run on the same GPU in the same minutes. What a bar says is in `verdicts`; the peaks that
two of them refer to are measured first, with PyTorch's own products and copies.
"""

import argparse
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.common import calls
from bench.common.machine import about, step_bytes
from bench.common.settings import SHAPE, TOKENS, Settings
from bench.common.timing import median_s, pictures, seconds
from bench.load import arrivals
from bench.load.apache import AB_MISSING
from bench.load.side_by_side import images_per_second
from bench.sections import front_ends
from runtime.engine import Engine
from runtime.execution.device import DeviceRunner
from runtime.model import manifest as manifests
from runtime.model.manifest import UNFORCED
from runtime.planning.config import EngineConfig
from runtime.providers import cuda
from runtime.providers.gpu import require_gpu

_ENGINE = Path("engines/random-git-base-cuda")
_DEMO, _SAMPLES = Path("engines/demo"), Path("demo/samples")
_GIB = 2**30
_IN_A_ROW = 20  # encoder calls: before the first one the GPU waits for pixels
_BEAMS = 4
_ONCE = "fp16 encoded-once"  # `bench.contestants.encoded_once`; the others are Hugging Face's


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table: a bar, what was measured, whether that is enough (None: not judged)."""

    what: str
    bar: str
    measured: str
    passed: bool | None


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to measure. `batches`: batches of mixed sizes, for the growth of memory."""

    images: int
    batches: int
    repeats: int
    torch_modes: tuple[str, ...]
    torch_batches: tuple[int, ...]


QUICK = Extent(4096, 2_000, 3, ("fp16",), (64, 256))
FULL = Extent(
    16384, 10_000, 5, ("fp32", "fp16", "bf16", "fp16 compiled", _ONCE, f"{_ONCE} compiled"),
    (1, 16, 64, 256),
)  # fmt: skip


def main() -> int:
    """Measure, print and write the table; status 1 if a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--called", default="python -m bench.cuda")
    args = parser.parse_args()
    extent = QUICK if args.quick else FULL
    _exported()
    facts = about() | {
        "gpu": str(require_gpu(cuda.major())),
        "command": args.called,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {}
    for name, value in measure(extent):
        measured[name] = value
        _write(args.output, {"about": facts, "measured": measured})
    if failed := [name for name, value in measured.items() if "failed" in value]:
        print(f"not measured, see above: {', '.join(failed)}", file=sys.stderr)
        return 1
    lines = verdicts(measured)
    rows = [asdict(line) for line in lines]
    _write(args.output, {"about": facts, "measured": measured, "lines": rows})
    (args.output / "cuda.md").write_text(table(facts, lines))
    print(table(facts, lines))
    return int(any(line.passed is False for line in lines))


def _write(folder: Path, content: dict[str, Any]) -> None:
    (folder / "cuda.json").write_text(json.dumps(content, indent=2) + "\n")


def _exported() -> None:
    """Export git-base with random weights for CUDA, once; nothing is downloaded."""
    if (_ENGINE / manifests.FILE).is_file():
        return
    subprocess.run(
        [sys.executable, "-m", "export", "--random-weights", SHAPE, "--target", "cuda", "--no-int8",
         "--verify-images", "2", "--output", str(_ENGINE)],
        check=True,
    )  # fmt: skip


def measure(extent: Extent) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part's name and measurements for the bars and the table; times in seconds, memory in
    bytes. A part that failed has the error instead: on a GPU for hire the rest is worth having.
    """
    engine = Engine.open(_ENGINE, EngineConfig(provider="cuda"))
    assert isinstance(engine.runner, DeviceRunner)
    on_its_thread = engine.stepper.thread.call  # which has captured the graphs
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("peaks", peaks),
        ("encoder", partial(on_its_thread, partial(encoder, engine, extent))),
        ("decoder", partial(on_its_thread, partial(decoder, engine, extent))),
        ("offline", partial(offline, engine, extent)),
        ("beams", partial(beams, engine, extent)),
        ("memory", partial(growth, engine, extent)),
        ("two_workers", partial(two_workers, extent)),
        ("samples", samples),
        ("front_ends", _taken_in),
        ("torch", partial(torch_side, extent)),
    ]
    for name, part in tqdm(parts, desc="CUDA", unit="part"):
        try:
            yield name, part()
        except Exception as error:
            traceback.print_exc()
            yield name, {"failed": f"{type(error).__name__}: {error}"}


def _taken_in() -> dict[str, Any]:
    """Throughput of the front-ends; the reason it was left out where ab is missing."""
    if shutil.which("ab") is None:
        return {"left_out": AB_MISSING, "rows": []}
    return front_ends.measure(Settings(), "cuda")


def peaks() -> dict[str, float]:
    """Peak rates: fp16 matrix products in operations/s, copying (reads plus writes) in bytes/s."""
    import torch

    size = 8192
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    large = torch.ones(_GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(large)

    def best(action: Callable[[], object]) -> float:
        def waited() -> None:
            action()
            torch.cuda.synchronize()

        for _ in range(3):
            waited()
        return min(seconds(waited) for _ in range(10))

    return {
        "fp16_ops": 2 * size**3 / best(lambda: torch.matmul(a, b)),
        "bandwidth": 2 * _GIB / best(lambda: target.copy_(large)),
    }


def encoder(engine: Engine, extent: Extent) -> dict[str, Any]:
    """Encoder seconds per image by batch size, and operations per image. Whole batches follow one
    another, so that the next one's pixels are made ready meanwhile.
    """
    from bench.common.machine import encoder_work

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
    images = pictures(16, engine.manifest.sizes.pixels) * (extent.images // 16 // _BEAMS)

    def rate(**sampling: Any) -> float:
        run = partial(engine.generate, images, max_new_tokens=TOKENS, ignore_eos=True, **sampling)
        return len(images) / median_s(run, extent.repeats)

    return {"greedy": rate(), "searched": rate(num_beams=_BEAMS)}


def two_workers(extent: Extent) -> dict[str, float]:
    """Images per second of two engines that share the GPU, and of one in a process like theirs."""
    run = partial(images_per_second, _ENGINE, images=extent.images)
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


def torch_side(extent: Extent) -> dict[str, dict[int, float]]:
    """Seconds per image in PyTorch, by mode and batch size."""
    import torch

    from bench.contestants.encoded_once import EncodedOnce
    from bench.contestants.model import TorchCaptioner

    found: dict[str, dict[int, float]] = {}
    pixels = pictures(max(extent.torch_batches), (3, 224, 224))
    for mode in extent.torch_modes:
        precision, *how = mode.split()
        if mode.startswith(_ONCE):
            model: Any = EncodedOnce(precision, "compiled" in how, "cuda")
            images: list[Any] = pixels
        else:
            model = TorchCaptioner(precision, "cuda", "compiled" in how)
            images = [model.normalise(p) for p in pixels]
        found[mode] = {}
        for batch in extent.torch_batches:
            run = partial(model.generate, images[:batch])
            run()  # compiles again if a shape was new
            found[mode][batch] = median_s(run, extent.repeats) / batch
        del model
        torch.cuda.empty_cache()
    return found


def verdicts(found: dict[str, Any]) -> list[Line]:
    """Compare each bar with the measurements."""
    peaks_, encode, decode = found["peaks"], found["encoder"], found["decoder"]
    share = encode["ops"] / encode["best"] / peaks_["fp16_ops"]
    times = decode["seconds"] / (decode["bytes"] / peaks_["bandwidth"])
    offline_ = found["offline"]
    rate, one, uneven = (offline_[k] for k in ("per_second", "one", "uneven_per_second"))
    theirs, once = (
        min((s for mode in modes for s in found["torch"][mode].values()), default=None)
        for modes in _half_modes(found["torch"])
    )
    memory, said, pair = found["memory"], found["samples"], found["two_workers"]
    slower = found["beams"]["greedy"] / found["beams"]["searched"]
    mib, taken_in = memory["grown"] / 2**20, found["front_ends"]
    return [
        Line("encoder, share of the measured fp16 product rate", ">= 45 %", f"{share:.0%}",
             share >= 0.45),
        Line(f"decode step of {decode['rows']} rows over its bytes at the measured bandwidth",
             "<= 3 x", f"{times:.1f} x ({decode['seconds'] * 1e3:.2f} ms)", times <= 3),
        Line(f"offline, images a second, {TOKENS} tokens each", ">= 4,000", f"{rate:,.0f}",
             rate >= 4000),
        Line(f"the same, as uneven as COCO's ({offline_['uneven_tokens']:.1f} tokens)", ">= 3,500",
             f"{uneven:,.0f}", uneven >= 3500),
        Line("offline, against HF fp16 `generate` at its best batch", ">= 10 x",
             *_ratio(rate, theirs, 10)),
        Line("captions of uneven length, --workers 2 against 1, images a second", "-",
             f"{pair['two']:,.0f} against {pair['one']:,.0f}", None),
        Line("offline, against PyTorch fp16 that encodes once, compiled, at its best batch",
             ">= 3 x", *_ratio(rate, once, 3)),
        Line(f"{_BEAMS} beams, time against greedy", "<= 1.6 x",
             f"{slower:.1f} x ({found['beams']['searched']:,.0f} images a second)", slower <= 1.6),
        Line("one image alone", "<= 12 ms", f"{one * 1e3:.1f} ms", one <= 0.012),
        Line(f"memory grown over {memory['batches']:,} batches of mixed sizes", "none (< 8 MiB)",
             f"{mib:.0f} MiB", mib < 8),
        Line("640x480 JPEGs a second over HTTP, by number of front-ends", "-",
             ", ".join(f"{r['front_ends']}: {r['per_second']:.0f}" for r in taken_in["rows"])
             or taken_in["left_out"], None),
        Line("demo samples captioned word for word in fp16", "all",
             f"{said['right']} of {said['of']}", said["right"] == said["of"]),
    ]  # fmt: skip


def _half_modes(modes: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the modes in fp16: Hugging Face's, and those that encode once."""
    half = [mode for mode in modes if mode.startswith("fp16")]
    once = [mode for mode in half if mode.startswith(_ONCE)]
    return [mode for mode in half if mode not in once], once


def _ratio(rate: float, seconds: float | None, least: float) -> tuple[str, bool | None]:
    if seconds is None:
        return "not measured", None
    return f"{rate * seconds:.1f} x", rate * seconds >= least


def table(facts: dict[str, Any], lines: list[Line]) -> str:
    """The lines as a Markdown table, headed by command, date, commit, GPU and machine."""
    words = {True: "pass", False: "FAIL", None: "-"}
    rows = [f"| {x.what} | {x.bar} | {x.measured} | {words[x.passed]} |" for x in lines]
    return "\n".join(
        [
            "# On a GPU",
            "",
            f"`{facts['command']}` on {facts['date']}, commit {facts['commit']}: {facts['gpu']}, "
            f"{facts['machine']}. {SHAPE} with random weights, {TOKENS} tokens.",
            "",
            "| what | bar | measured | |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
