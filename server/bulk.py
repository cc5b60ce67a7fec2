"""`vignette caption`: caption image files into lines of JSON, here or by a service elsewhere.

A run that was interrupted goes on where it was when the same command is given again. The exit
status is 0 if all files have captions, 1 if any has none, 2 for a wrong argument, 130 if
interrupted.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.model.preprocess import SUFFIXES
from runtime.offline.files import Outcome, caption_files
from runtime.offline.jsonl import About, CaptionLines, OutputConflict, opened, plain
from runtime.planning.config import AUTO, PROVIDERS, EngineConfig, demo_engine
from runtime.request import Caption, FinishReason
from server.http.client import RemoteService, caption_remotely

_KEY = "VIGNETTE_API_KEY"
_SKIPPED = 5  # kinds of files that are named
_OTHER_FORMATS = (".csv", ".tsv", ".parquet", ".xlsx", ".arrow")


class NoImages(VignetteError):
    """There is nothing to caption."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if any file has no caption."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        files = list(dict.fromkeys(_images(args.images)))
        captioner = _remote(args) if args.url else _local(args)
        with _lines(args, files, captioner.about) as lines:
            left = [file for file in files if plain(file) not in lines.done]
            told: Counter[str] = Counter()
            if left:
                print(captioner.where, file=sys.stderr)
                outcomes = captioner.caption(left, args.prompt, args.max_new_tokens)
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
    parser = argparse.ArgumentParser(prog="vignette caption", description=__doc__)
    parser.add_argument(
        "images", type=Path, nargs="+",
        help="image files, and folders that hold some, at any depth; hidden ones are left out",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="write here, and go on from what is there; left out, standard output",
    )  # fmt: skip
    parser.add_argument(
        "--again", action="store_true",
        help="caption anew what the output has from other settings, or of files that changed since",
    )  # fmt: skip
    parser.add_argument(
        "--engine", type=Path, default=demo_engine(), help="engine folder (%(default)s)"
    )
    parser.add_argument(
        "--url",
        help="of a service that is to caption them, such as http://host:8000, instead of an engine "
        f"here; its key, if it wants one, is taken from ${_KEY}",
    )
    parser.add_argument("--model", help="of the service's, where it has several (its first)")
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
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue  # previews, caches, versions: not what somebody sees there
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


@dataclass(frozen=True, slots=True)
class _Captioner:
    """Who captions: what decides what they say, where that is for people, and how to ask."""

    about: About
    where: str
    caption: Callable[[list[Path], str | None, int | None], Iterator[Outcome]]


def _local(args: argparse.Namespace) -> _Captioner:
    config = EngineConfig(slots=args.slots, provider=args.provider, precision=args.precision)
    engine = Engine.open(args.engine, config)
    return _Captioner(engine.identity, engine.runs_on, partial(caption_files, engine))


def _remote(args: argparse.Namespace) -> _Captioner:
    service = RemoteService.at(args.url, os.environ.get(_KEY), args.model)
    where = f"{service.model} on {service.url}, {service.connections} at a time"
    return _Captioner(service.identity, where, partial(caption_remotely, service))


def _lines(
    args: argparse.Namespace, files: list[Path], about: About
) -> AbstractContextManager[CaptionLines]:
    asked = {"prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
    about = about | {name: value for name, value in asked.items() if value is not None}
    if args.output is None:
        return nullcontext(CaptionLines(opened(sys.stdout.fileno(), "a"), about))
    if args.output.suffix.lower() in _OTHER_FORMATS:
        raise OutputConflict(f"{args.output}: only lines of JSON are written: name it .jsonl")
    return CaptionLines.resume(args.output, about, files, args.again)


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
