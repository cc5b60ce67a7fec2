"""`python -m bench`: measure, plot, and put everything on one page."""

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import (
    ablation,
    apache,
    batches,
    images,
    machine,
    offline,
    open_loop,
    report,
    scheduling,
)
from bench.settings import QUICK, SHAPE, TOKENS, Settings
from runtime.errors import VignetteError

Section = Callable[[Settings, dict[str, Any]], dict[str, Any]]


def _known_rates(sections: dict[str, Any]) -> dict[str, float]:
    """Best closed-loop rate of each contestant."""
    best: dict[str, float] = {}
    for run in sections.get("http", {}).get("runs", []):
        name = run["contestant"]
        best[name] = max(best.get(name, 0.0), run.get("rate", 0.0))
    return {name: rate for name, rate in best.items() if rate}


SECTIONS: dict[str, Section] = {
    "images": lambda settings, _: images.measure(settings),
    "roofline": lambda settings, _: machine.measure(settings),
    "batches": lambda settings, _: batches.measure(settings),
    "offline": lambda settings, done: offline.measure(settings, done.get("batches", {})),
    "ablation": lambda settings, _: ablation.measure(settings),
    "scheduling": lambda settings, _: scheduling.measure(settings),
    "http": lambda settings, _: apache.measure(settings),
    "open_loop": lambda settings, done: open_loop.measure(settings, _known_rates(done)),
}
BASELINE: Section = lambda settings, _: apache.measure(settings, only_baselines=True)  # noqa: E731


def main() -> int:
    """Run the command line; status 1 when a part failed."""
    args = _parser().parse_args()
    settings = dataclasses.replace(QUICK if args.quick else Settings(), engine=args.engine)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started, sections = time.time(), dict[str, Any]()
    for name in args.sections:
        section = BASELINE if args.baseline and name == "http" else SECTIONS[name]
        print(f"== {name}", flush=True)
        try:
            sections[name] = section(settings, sections)
        except (VignetteError, RuntimeError, OSError) as error:
            tqdm.write(f"{name} failed: {error}")
            sections[name] = {"failed": str(error)}
    about = machine.about() | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seconds": time.time() - started,
        "command": "make " + ("baseline" if args.baseline else "benchmark")
        + (" QUICK=1" if args.quick else ""),
        "work": f"{SHAPE} with random weights, {TOKENS} new tokens a caption",
    }  # fmt: skip
    report.write({"about": about, "sections": sections}, args.output)
    print(f"{args.output / report.PAGE}: {about['seconds'] / 60:.1f} minutes")
    return int(any(isinstance(s.get("failed"), str) for s in sections.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", default=list(SECTIONS),
        help=f"what to measure: {', '.join(SECTIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--engine", type=Path, default=Settings().engine, help="engine folder")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--baseline", action="store_true", help="over HTTP, PyTorch only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
