"""`python -m runtime`: caption image files into a file of JSON lines, without a server.

A run that was interrupted goes on where it was when the same command is given again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from tqdm import tqdm

from runtime.bulk import caption_files
from runtime.config import AUTO, PROVIDERS, EngineConfig
from runtime.engine import Engine
from runtime.errors import VignetteError
from runtime.preprocess import SUFFIXES
from runtime.request import Caption


class BadInput(VignetteError):
    """Files or folders that can't be read from, or written to."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if any file has no caption."""
    args = _parser().parse_args(arguments)
    try:
        files = list(dict.fromkeys(_images(args.images)))
        done = _done(args.output, args.prompt) if args.output else set()
        left = [file for file in files if str(file) not in done]
        failed = _caption(left, args) if left else 0
    except (VignetteError, OSError) as error:  # of a single image, none gets here
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "; the same command goes on from here" if args.output else ""
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    before = f", {len(files) - len(left)} before" if len(left) < len(files) else ""
    print(f"{len(left) - failed} captioned{before}, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


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
    parser.add_argument("--prompt", help="a question about each image, or how its caption begins")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of a caption (20)")
    parser.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    parser.add_argument(
        "--precision", default=AUTO,
        help="encoder/decoder/cache, one of the combinations in the engine's manifest.json (auto)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, help="sequences that decode together (16; GPU: more)")
    return parser


def _images(given: list[Path]) -> Iterator[Path]:
    for path in given:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not found:
                raise BadInput(f"{path} holds no images: none ends in {', '.join(SUFFIXES)}")
            yield from found
        elif path.exists():
            yield path
        else:
            raise BadInput(f"{path} does not exist")


def _done(output: Path, prompt: str | None) -> set[str]:
    """Files that have a caption in `output`; its other lines are taken out, to be tried again."""
    if not output.exists():
        return set()
    with _opened(output, "r") as written:
        lines = written.readlines()
    captioned: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break  # the last run was killed while it wrote this
        entry = _entry(line)
        if entry is None:
            raise BadInput(f"{output}, line {number}, is no caption: name another --output")
        if entry.get("prompt") != prompt:
            raise BadInput(f"{output} answers another --prompt: name another --output")
        if "caption" in entry:
            captioned[entry["file"]] = line
    if len(captioned) < len(lines):
        partial = output.with_name(f".{output.name}.partial")
        with _opened(partial, "w") as rewritten:
            rewritten.writelines(captioned.values())
        partial.replace(output)
    return set(captioned)


def _entry(line: str) -> dict[str, str] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "file" in entry else None


def _caption(files: list[Path], args: argparse.Namespace) -> int:
    """Write a line for each file; returns how many have no caption."""
    failed = 0
    config = EngineConfig(slots=args.slots, provider=args.provider, precision=args.precision)
    engine = Engine.open(args.engine, config)
    print(engine.runs_on, file=sys.stderr)
    outcomes = caption_files(engine, files, args.prompt, args.max_new_tokens)
    with _opened(args.output or sys.stdout.fileno(), "a") as lines:
        for file, outcome in tqdm(outcomes, total=len(files), unit="image"):
            line = {"file": str(file)} | ({} if args.prompt is None else {"prompt": args.prompt})
            if isinstance(outcome, Caption):
                line["caption"] = outcome.text
            else:
                line["error"] = str(outcome)
                failed += 1
            print(json.dumps(line, ensure_ascii=False), file=lines, flush=True)
    return failed


def _opened(file: Path | int, mode: str) -> IO[str]:
    """File names need not be UTF-8: they are written as they are."""
    kept = isinstance(file, Path)
    return open(file, mode, encoding="utf-8", errors="surrogateescape", closefd=kept)


if __name__ == "__main__":
    sys.exit(main())
