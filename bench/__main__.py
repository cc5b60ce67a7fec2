"""`vignette bench`: measure, plot, and put everything on one page."""

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.common.machine import about
from bench.common.settings import QUICK, SHAPE, TOKENS, Settings
from bench.load import apache
from bench.report import page
from bench.sections import (
    ablation,
    batches,
    beams,
    bulk,
    cluster,
    front_ends,
    http,
    images,
    offline,
    open_loop,
    profile,
    protocols,
    rival,
    roofline,
    scaling,
    scheduling,
    scores,
    service,
)
from runtime.errors import VignetteError
from runtime.model import manifest as manifests

WITH_AB = {"http", "service", "front_ends"}
Section = Callable[[Settings, dict[str, Any]], dict[str, Any]]


def _known_rates(sections: dict[str, Any]) -> dict[str, float]:
    """Highest closed-loop throughput of each contestant, in captions per second."""
    best: dict[str, float] = {}
    for run in sections.get("http", {}).get("runs", []):
        name = run["contestant"]
        best[name] = max(best.get(name, 0.0), run.get("rate", 0.0))
    return {name: rate for name, rate in best.items() if rate}


def _alone(measure: Callable[[Settings], dict[str, Any]]) -> Section:
    """A section that needs no other's results."""
    return lambda settings, _: measure(settings)


SECTIONS: dict[str, Section] = {
    "images": _alone(images.measure),
    "roofline": _alone(roofline.measure),
    "profile": _alone(profile.measure),
    "batches": _alone(batches.measure),
    "offline": lambda settings, done: offline.measure(settings, done.get("batches", {})),
    "bulk": _alone(bulk.measure),
    "rival": _alone(rival.measure),
    "beams": _alone(beams.measure),
    "scores": _alone(scores.measure),
    "ablation": _alone(ablation.measure),
    "scheduling": _alone(scheduling.measure),
    "http": _alone(http.measure),
    "service": _alone(service.measure),
    "protocols": _alone(protocols.measure),
    "cluster": _alone(cluster.measure),
    "scaling": _alone(scaling.measure),
    "front_ends": _alone(front_ends.measure),
    "open_loop": lambda settings, done: open_loop.measure(settings, _known_rates(done)),
}
BASELINE = _alone(partial(http.measure, only_baselines=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; status 1 if a section failed or tokens differ, 2 if it can't start."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(given)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]}: name some of {', '.join(SECTIONS)}")
    settings = dataclasses.replace(QUICK if args.quick else Settings(), engine=args.engine)
    try:
        model = manifests.load(settings.engine).model
    except VignetteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if model != f"random/{SHAPE}":
        print(f"error: both sides run {SHAPE} with random weights: leave --engine", file=sys.stderr)
        return 2
    if WITH_AB & set(args.sections) and shutil.which("ab") is None:
        print(f"error: {apache.AB_MISSING}", file=sys.stderr)
        return 2
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.time()
    described = about() | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": args.called or shlex.join(["vignette", "bench", *given]),
        "work": f"{SHAPE} with random weights, {TOKENS} new tokens a caption",
    }
    results: dict[str, Any] = {"about": described, "sections": {}}
    for name in args.sections:
        section = BASELINE if args.baseline and name == "http" else SECTIONS[name]
        print(f"== {name}", flush=True)
        try:
            results["sections"][name] = section(settings, results["sections"])
        except Exception as error:  # any exception: the other sections are still worth having
            traceback.print_exc()
            results["sections"][name] = {"failed": f"{type(error).__name__}: {error}"}
        described["seconds"] = time.time() - started
        page.write(results, args.output)
    print(f"{args.output / page.PAGE}: {described['seconds'] / 60:.1f} minutes")
    unequal = results["sections"].get("offline", {}).get("tokens_equal") is False
    return int(_failed(results["sections"]) or unequal)


def _failed(part: Any) -> bool:
    """Whether `part`, or anything nested in it, records a failure."""
    if isinstance(part, dict):
        return bool(part.get("failed")) or any(map(_failed, part.values()))
    return isinstance(part, list) and any(map(_failed, part))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vignette bench", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", default=list(SECTIONS),
        help=f"what to measure: {', '.join(SECTIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--engine", type=Path, default=Settings().engine, help="engine folder")
    parser.add_argument("--output", type=Path, default=Path("bench/runs/latest"))
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--called", help="how to name the command in the results")
    parser.add_argument("--baseline", action="store_true", help="over HTTP, PyTorch only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
