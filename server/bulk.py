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
from typing import Any

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
                outcomes = captioner.caption(left, args.prompt, **_sampling(args))
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
    for name, (kind, does) in _SAMPLING.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar="N", dest=name, help=does)
    parser.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    parser.add_argument(
        "--precision", default=AUTO,
        help="encoder/decoder/cache, one of the combinations in the engine's manifest.json (auto)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, help="sequences that decode together (16; GPU: more)")
    return parser


def _early(text: str) -> bool | str:
    """A value of --early-stopping."""
    return {"true": True, "false": False}.get(text, text)


_SAMPLING: dict[str, tuple[Callable[[str], Any], str]] = {  # flags that are sampling parameters
    "max_new_tokens": (int, "of a caption (20)"),
    "min_new_tokens": (int, "of a caption (0)"),
    "n": (int, "captions of each image (1)"),
    "num_beams": (int, "texts to follow at once, of which the best is taken (1)"),
    "length_penalty": (float, "of beams: above 0 for long captions (1)"),
    "early_stopping": (_early, "of beams: true, false or never (false)"),
    "no_repeat_ngram_size": (int, "so many tokens in a row are there only once (0: any)"),
    "repetition_penalty": (float, "above 1 for fewer repetitions (1)"),
    "temperature": (float, "0 takes the likeliest token, more draws one (0)"),
    "top_k": (int, "draw from so many of the likeliest tokens (50)"),
    "top_p": (float, "draw from the fewest tokens that are together so likely (1)"),
    "seed": (int, "the same one draws the same captions"),
}


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of it."""
    given = {name: getattr(args, name) for name in _SAMPLING}
    return {name: value for name, value in given.items() if value is not None}


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
    caption: Callable[..., Iterator[Outcome]]


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
    prompt = {} if args.prompt is None else {"prompt": args.prompt}
    about = about | prompt | _sampling(args)
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
