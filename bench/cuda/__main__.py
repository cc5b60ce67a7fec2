"""`make gpu-check` and `make benchmark DEVICE=cuda`: the GPU path, measured and held to its bars.

Both sides run on the same GPU in the same minutes. What a bar says is in `verdicts`; the peaks that
two of them refer to are measured first, with PyTorch's own products and copies.
"""

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.common.machine import about
from bench.common.settings import SHAPE
from bench.cuda import ours, theirs
from bench.cuda.extent import FULL, QUICK, Extent
from bench.cuda.verdicts import table, verdicts
from runtime.engine import Engine
from runtime.execution.device import DeviceRunner
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig
from runtime.providers import cuda
from runtime.providers.gpu import require_gpu


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
    if (ours.ENGINE / manifests.FILE).is_file():
        return
    subprocess.run(
        [sys.executable, "-m", "export", "--random-weights", SHAPE, "--target", "cuda", "--no-int8",
         "--verify-images", "2", "--output", str(ours.ENGINE)],
        check=True,
    )  # fmt: skip


def measure(extent: Extent) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part's name and measurements for the bars and the table; times in seconds, memory in
    bytes. A part that failed has the error instead: on a GPU for hire the rest is worth having.
    """
    engine = Engine.open(ours.ENGINE, EngineConfig(provider="cuda"))
    assert isinstance(engine.runner, DeviceRunner)
    on_its_thread = engine.stepper.thread.call  # which has captured the graphs
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("peaks", theirs.peaks),
        ("encoder", partial(on_its_thread, partial(ours.encoder, engine, extent))),
        ("decoder", partial(on_its_thread, partial(ours.decoder, engine, extent))),
        ("offline", partial(ours.offline, engine, extent)),
        ("beams", partial(ours.beams, engine, extent)),
        ("memory", partial(ours.growth, engine, extent)),
        ("two_workers", partial(ours.two_workers, extent)),
        ("samples", ours.samples),
        ("front_ends", ours.taken_in),
        ("torch", partial(theirs.torch_side, extent)),
    ]
    for name, part in tqdm(parts, desc="CUDA", unit="part"):
        try:
            yield name, part()
        except Exception as error:
            traceback.print_exc()
            yield name, {"failed": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.exit(main())
