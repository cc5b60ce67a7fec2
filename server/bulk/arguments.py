"""The flags of `vignette caption`."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from msgspec.structs import fields

from runtime.limits import DEFAULT_MAX_NEW_TOKENS
from runtime.model.preprocess import MAX_PIXELS
from runtime.planning.config import AUTO, PROVIDERS, demo_engine
from runtime.request import SamplingParams
from server.requests.fields import SAMPLING, CaptionFields
from server.settings import LOCAL

KEY = "VIGNETTE_API_KEY"
SAMPLING_FLAGS: dict[str, Any] = {  # flags that are sampling parameters, and their defaults
    field.name: DEFAULT_MAX_NEW_TOKENS if field.required else field.default
    for field in fields(SamplingParams)
    if field.name in SAMPLING - {"logprobs"}  # rows have no logprobs
} | {"seed": "any"}
_MOST = 10**9  # of any number
_Number = TypeVar("_Number", int, float)


def command_line(description: str) -> argparse.ArgumentParser:
    """The parser; a wrong argument ends the process with status 2 and a message."""
    parser = argparse.ArgumentParser(
        prog="vignette caption", description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("images", nargs="+", metavar="INPUT", help="what to caption, see above")
    _add_reading(parser.add_argument_group("reading"))
    _add_writing(parser.add_argument_group("writing"))
    _add_captioning(parser.add_argument_group("captioning"))
    return parser


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--column", metavar="NAME",
        help="of a list: paths, URLs or image bytes (image); of a shard the member's extension",
    )  # fmt: skip
    group.add_argument("--prompt-column", metavar="NAME", help="likewise, of each image's prompt")
    group.add_argument(
        "--id-column", metavar="NAME",
        help="of a list: what its rows are called in the output (the path or URL)",
    )  # fmt: skip
    group.add_argument(
        "--max-image-mb", type=_megabytes, default=100, metavar="N", help="of an image's file (100)"
    )
    group.add_argument(
        "--max-pixels",
        type=_positive,
        default=MAX_PIXELS,
        metavar="N",
        help="of an image (%(default)s)",
    )


def _add_writing(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--output", default="-", metavar="NAME",
        help="go on from what is there: .jsonl, .csv, .parquet, .tar (WebDataset), a folder/ that "
        "gets a .txt for each image, or - for lines of JSON on standard output (-)",
    )  # fmt: skip
    group.add_argument("--ordered", action="store_true", help="rows in the order of the input")
    group.add_argument(
        "--dedupe", action="store_true", help="caption images that are equal, byte by byte, once"
    )
    group.add_argument(
        "--retry-failed", action="store_true", help="try those again that the output has errors of"
    )
    group.add_argument(
        "--again", action="store_true",
        help="caption anew what the output has from other settings, or of files that changed since",
    )  # fmt: skip
    group.add_argument(
        "--overwrite", action="store_true", help="also .txt files that this did not write"
    )


def _add_captioning(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine", type=Path, default=demo_engine(), help="engine folder (%(default)s)"
    )
    group.add_argument(
        "--url",
        type=_service,
        help="of a service that is to caption them, such as http://host:8000, instead of an engine "
        f"here; its key, if it wants one, is taken from ${KEY}",
    )
    group.add_argument("--model", help="of the service's, where it has several (its first)")
    group.add_argument(
        "--prompt", type=_text, help="a question about each image, or how its caption begins"
    )
    for name, usual in SAMPLING_FLAGS.items():
        about = f"{CaptionFields.model_fields[name].description} ({str(usual).lower()})"
        takes = "true|false|never" if name == "early_stopping" else "N"
        group.add_argument(f"--{name.replace('_', '-')}", metavar=takes, dest=name, help=about)
    group.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    group.add_argument(
        "--precision", default=AUTO,
        help="encoder/decoder/cache, one of the combinations in the engine's manifest.json (auto)",
    )  # fmt: skip
    group.add_argument(
        "--ray", nargs="?", const=LOCAL, metavar="ADDRESS",
        help="on a Ray cluster (auto: the one that this machine is of); without an address on one "
        "that is started for it; engine and package have to be on every node",
    )  # fmt: skip
    group.add_argument(
        "--ray-cores", type=_positive, default=4, metavar="N",
        help="of each engine there, where there are no GPUs (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--slots", type=_positive, help="sequences that decode together (16; GPU: more)"
    )


def _megabytes(given: str) -> float:
    if not 0 < (number := _number(float, given)) < math.inf:
        raise argparse.ArgumentTypeError(f"{given} is no size: give a number above 0")
    return number


def _positive(given: str) -> int:
    if (number := _number(int, given)) < 1:
        raise argparse.ArgumentTypeError(f"{given} is too small: give 1 or more")
    if number > _MOST:
        raise argparse.ArgumentTypeError(f"{given} is too large: give {_MOST} or less")
    return number


def _text(given: str) -> str | None:
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{given!a} is not UTF-8") from error
    return given or None


def _number(kind: Callable[[str], _Number], given: str) -> _Number:
    try:
        return kind(given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given!r} is no number that this takes") from error


def _service(given: str) -> str:
    try:
        parts = urlsplit(given)
        fit = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        fit = fit and given.isprintable() and " " not in given
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{given} is no URL: {error}") from error
    if not fit:
        raise argparse.ArgumentTypeError(
            f"{given} is no URL of a service: it looks like http://host:8000"
        )
    return given
