"""`vignette evaluate --data captions.json --images DIR`: what 8 bits or beams do to captions.

Each setting captions the same pictures; what people said of them judges (CIDEr, BLEU-4, ROUGE-L).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

from bench.quality import data, page
from bench.quality.contestants import Contestant, OnEngine, OnTorch
from bench.quality.data import Picture
from bench.quality.metrics import score
from bench.quality.page import Result
from runtime.errors import VignetteError
from runtime.model.manifest import EXACT, read
from runtime.planning.config import AUTO, PROVIDERS, demo_engine
from runtime.request import RANGES


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. A wrong argument exits with 2."""
    parser = _parser()
    args = parser.parse_args(arguments)
    _check_numbers(parser, args)
    try:
        name = read(args.engine).model
        pictures = data.read(args.data, args.images, args.limit)
        _check_outputs(parser, args, [picture.file for picture in pictures])
        results = []
        for contestant in _contestants(args):
            captions = contestant.captions(pictures)
            scores = score(captions, [picture.references for picture in pictures])
            results.append(Result(contestant.name, captions, scores))
        page.write(args.output, f"{name}: {len(pictures)} pictures", pictures, results)
        if args.json:
            _write_captions(args.json, pictures, results)
    except (VignetteError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for row in page.rows(results):
        print("\t".join(row))
    print(f"the pictures that differ most: {args.output}")
    return 0


def _check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}: give 1 or more, or leave it out")
    least, most = RANGES["num_beams"]
    if wrong := [beams for beams in args.beams if not least <= beams <= most]:
        parser.error(f"--beams has {wrong[0]}: give {least} to {most}")


def _check_outputs(
    parser: argparse.ArgumentParser, args: argparse.Namespace, pictures: Sequence[Path]
) -> None:
    """Open each output, so that a wrong one fails before captioning. Existing content stays."""
    outputs = [path for path in (args.output, args.json) if path is not None]
    if len({path.resolve() for path in outputs}) < len(outputs):
        parser.error(f"--output and --json are both {args.json}: give two files")
    for path in outputs:
        if not path.is_file():
            continue
        below = path.resolve().is_relative_to(args.images.resolve())
        linked = path.stat().st_nlink > 1 and any(each.samefile(path) for each in pictures)
        if below or linked or path.samefile(args.data):
            parser.error(f"{path} is read, and would be overwritten: give another output")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for path in outputs:
            path.open("a").close()
    except OSError as error:
        parser.error(f"an output can't be written ({error}): give another --output or --json")


def _write_captions(path: Path, pictures: Sequence[Picture], results: Sequence[Result]) -> None:
    found = [
        {**asdict(picture), "file": str(picture.file),
         "captions": {result.name: result.captions[place] for result in results}}
        for place, picture in enumerate(pictures)
    ]  # fmt: skip
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vignette evaluate", description=__doc__)
    parser.add_argument("--engine", type=Path, default=demo_engine(), help="(%(default)s)")
    parser.add_argument(
        "--data", type=Path, required=True,
        help="references: COCO's JSON, or a table (.json, .jsonl, .csv) with columns image and "
        "caption, reference or references, optionally prompt",
    )  # fmt: skip
    parser.add_argument("--images", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--limit", type=int, help="so many pictures, the first ones (all)")
    parser.add_argument(
        "--precisions", nargs="+", metavar="P",
        help="encoder/decoder/cache to compare (the exact one, and this machine's choice)",
    )  # fmt: skip
    parser.add_argument("--beams", type=int, nargs="+", default=[1], help="to compare (1)")
    parser.add_argument(
        "--reference", metavar="CHECKPOINT",
        help="compare PyTorch, too: the checkpoint's folder or name; needs the extra export",
    )  # fmt: skip
    parser.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation.html"), help="(%(default)s)"
    )
    parser.add_argument("--json", type=Path, help="write all captions there")
    return parser


def _contestants(args: argparse.Namespace) -> list[Contestant]:
    """The settings to compare; the first is the baseline."""
    precisions = args.precisions or [EXACT, AUTO]
    found: list[Contestant] = []
    if args.reference:
        found += [OnTorch(args.reference, beams) for beams in args.beams]
    found += [
        OnEngine(args.engine, precision, beams, args.provider)
        for precision, beams in product(precisions, args.beams)
    ]
    return found


if __name__ == "__main__":
    sys.exit(main())
