"""`python -m runtime`: caption image files into lines of JSON, here or by a service elsewhere.

A run that was interrupted goes on where it was when the same command is given again.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tqdm import tqdm

from runtime import manifest as manifests
from runtime.bulk import Outcome, caption_files
from runtime.config import AUTO, PROVIDERS, EngineConfig
from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.lines import CaptionLines, opened
from runtime.preprocess import SUFFIXES
from runtime.remote import RemoteService, caption_remotely
from runtime.request import Caption, FinishReason

_KEY = "VIGNETTE_API_KEY"
_SKIPPED = 5  # kinds of files that are named


class NoImages(VignetteError):
    """There is nothing to caption."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if any file has no caption."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        files = list(dict.fromkeys(_images(args.images)))
        service = RemoteService.at(args.url, os.environ.get(_KEY)) if args.url else None
        with _lines(args, files, service) as lines:
            left = [file for file in files if str(file) not in lines.done]
            told: Counter[str] = Counter()
            if left:
                outcomes = _local(left, args) if service is None else _remote(left, args, service)
                told = _write(tqdm(outcomes, total=len(left), unit="image"), lines)
    except (VignetteError, OSError) as error:  # of a single image, none gets here
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if args.output else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    cut = f", {told['cut']} of them cut off (see --max-new-tokens)" if told["cut"] else ""
    before = f", {len(files) - len(left)} before" if len(left) < len(files) else ""
    print(f"{told['captioned']} captioned{cut}{before}, {told['failed']} failed", file=sys.stderr)
    return 1 if told["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runtime", description=__doc__)
    parser.add_argument(
        "images", type=Path, nargs="+",
        help="image files, and folders that hold some, at any depth",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="write here, and go on from what is there; left out, standard output",
    )  # fmt: skip
    parser.add_argument(
        "--engine", type=Path, default=Path("engines/demo"), help="engine folder (engines/demo)"
    )
    parser.add_argument(
        "--url",
        help="of a service that is to caption them, such as http://host:8000, instead of an engine "
        f"here; its key, if it wants one, is taken from ${_KEY}",
    )
    parser.add_argument("--prompt", help="a question about each image, or how its caption begins")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a caption (20)")
    parser.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    parser.add_argument(
        "--precision", default=AUTO,
        help="encoder/decoder/cache, one of the combinations in the engine's manifest.json (auto)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, help="sequences that decode together (16; GPU: more)")
    return parser


def _images(given: list[Path]) -> list[Path]:
    """The files that are meant; which others lie beside them is told."""
    found: list[Path] = []
    skipped: Counter[str] = Counter()
    for path in given:
        if not path.exists():
            raise NoImages(f"{path} does not exist")
        if not path.is_dir():
            found.append(path)
            continue
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() not in SUFFIXES:
                skipped[file.suffix.lower() or file.name] += file.is_file()
            elif file.is_file() or file.is_symlink():  # one that leads nowhere is told as such
                found.append(file)
    if not found:
        folders = ", ".join(map(str, given))
        raise NoImages(f"{folders} holds no images: none ends in {', '.join(SUFFIXES)}")
    if kinds := +skipped:
        names = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SKIPPED))
        more = " and others" if len(kinds) > _SKIPPED else ""
        print(f"skipped what is not named like an image: {names}{more}", file=sys.stderr)
    return found


def _lines(
    args: argparse.Namespace, files: list[Path], service: RemoteService | None
) -> AbstractContextManager[CaptionLines]:
    about = {"model": service.model if service else manifests.read(args.engine).model}
    if args.prompt is not None:
        about["prompt"] = args.prompt
    if args.output is None:
        return nullcontext(CaptionLines(opened(sys.stdout.fileno(), "a"), about))
    return CaptionLines.resume(args.output, about, map(str, files))


def _local(files: list[Path], args: argparse.Namespace) -> Iterator[Outcome]:
    config = EngineConfig(slots=args.slots, provider=args.provider, precision=args.precision)
    engine = Engine.open(args.engine, config)
    print(engine.runs_on, file=sys.stderr)
    return caption_files(engine, files, args.prompt, args.max_new_tokens)


def _remote(
    files: list[Path], args: argparse.Namespace, service: RemoteService
) -> Iterator[Outcome]:
    print(f"{service.model} on {service.url}, {service.connections} at a time", file=sys.stderr)
    return caption_remotely(service, files, args.prompt, args.max_new_tokens)


def _write(outcomes: Iterable[Outcome], lines: CaptionLines) -> Counter[str]:
    """A line for each file; returns how many were captioned, cut off, or failed."""
    told: Counter[str] = Counter()
    for file, outcome in outcomes:
        lines.write(file, outcome)
        if isinstance(outcome, Caption):
            told["captioned"] += 1
            told["cut"] += outcome.finish_reason is FinishReason.LENGTH
        else:
            told["failed"] += 1
    return told


if __name__ == "__main__":
    sys.exit(main())
