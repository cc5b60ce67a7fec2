"""`vignette caption`: caption images in bulk, here or by a service elsewhere.

Inputs are image files, folders, patterns ("photos/**/*.jpg"), lists (.txt, .csv, .jsonl, .parquet),
WebDataset shards (.tar), or - for a list on standard input; all of them also by URL: s3://, gs://,
hf://, https:// and whatever else fsspec knows. A run that was interrupted, or killed, goes on where
it was when the same command is given again. The exit status is 0 if all images have captions, 1 if
any has none, also of an earlier run, 2 for a wrong argument, 130 if interrupted.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import fields

from runtime.engine import Engine
from runtime.errors import InvalidRequest, VignetteError
from runtime.limits import DEFAULT_MAX_NEW_TOKENS
from runtime.model.preprocess import MAX_PIXELS, SUFFIXES
from runtime.planning.config import AUTO, PROVIDERS, EngineConfig, demo_engine
from runtime.request import SamplingParams
from server.bulk.captioning import Captioning, CaptioningOptions, RunFailed
from server.bulk.folders import Files
from server.bulk.inputs import NoImages, Part, items, parts
from server.bulk.lists import Columns
from server.bulk.local import LocalCaptioner
from server.bulk.output import Output
from server.bulk.outputs import open_output
from server.bulk.progress import Progress
from server.bulk.remote import RemoteCaptioner
from server.bulk.run import BulkRun, CaptionSettings, Counts
from server.bulk.tar import Tar
from server.fields import SAMPLING, CaptionFields, checked
from server.http.client import RemoteService

_KEY = "VIGNETTE_API_KEY"
_LOCAL = "local"  # which Ray takes for a cluster that is started here, and no other
_SKIPPED = 5  # kinds of files that are named
_SAMPLING: dict[str, Any] = {  # flags that are sampling parameters, and their defaults
    field.name: DEFAULT_MAX_NEW_TOKENS if field.required else field.default
    for field in fields(SamplingParams)
    if field.name in SAMPLING - {"logprobs"}  # of which a row has none
} | {"seed": "any"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if any image has no caption."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.ray and (args.ordered or args.dedupe or args.url):
        parser.error("--ordered, --dedupe and --url are for one machine: leave out --ray")
    if args.ordered and (args.again or args.retry_failed):
        parser.error("rows that are made again come last: leave out --ordered")
    try:
        args.sampling = _sampling(args)
    except InvalidRequest as error:
        parser.error(str(error))
    logging.basicConfig(format="%(message)s")
    limit = int(args.max_image_mb * 1e6)
    columns = Columns(args.column, args.prompt_column, args.id_column)
    try:
        given = parts(args.images, columns, limit)
        options = CaptioningOptions(args.prompt, limit, args.ordered, args.dedupe)
        inputs = [part.path for part in given]
        with closing(open_output(args.output, args.overwrite, inputs)) as output:
            run = _on_ray if args.ray else _here
            counts = run(args, options, given, output)
        _tell_skipped(given, counts)
    except (VignetteError, RunFailed, OSError) as error:  # of a single image, none gets here
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "" if args.output == "-" else "; the same command goes on from here"
        print(f"interrupted{again}", file=sys.stderr)
        return 130
    cut = f", {counts.cut} of them cut off (see --max-new-tokens)" if counts.cut else ""
    before = f", {counts.before} before" if counts.before else ""
    failed = counts.failed + counts.failed_before
    earlier = f", {counts.failed_before} of them before" if counts.failed_before else ""
    retry = "; try these again with --retry-failed" if failed and args.output != "-" else ""
    said = f"{counts.captioned} captioned{cut}{before}, {failed} failed{earlier}{retry}"
    print(said, file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vignette caption", description=__doc__,
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
        "--max-image-mb", type=float, default=100, metavar="N", help="of an image's file (100)"
    )
    group.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="of an image (%(default)s)"
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
        help="of a service that is to caption them, such as http://host:8000, instead of an engine "
        f"here; its key, if it wants one, is taken from ${_KEY}",
    )
    group.add_argument("--model", help="of the service's, where it has several (its first)")
    group.add_argument("--prompt", help="a question about each image, or how its caption begins")
    for name, usual in _SAMPLING.items():
        about = f"{CaptionFields.model_fields[name].description} ({str(usual).lower()})"
        group.add_argument(f"--{name.replace('_', '-')}", metavar="N", dest=name, help=about)
    group.add_argument("--provider", choices=PROVIDERS, default=AUTO, help="of the encoder (auto)")
    group.add_argument(
        "--precision", default=AUTO,
        help="encoder/decoder/cache, one of the combinations in the engine's manifest.json (auto)",
    )  # fmt: skip
    group.add_argument(
        "--ray", nargs="?", const=_LOCAL, metavar="ADDRESS",
        help="on a Ray cluster (auto: the one that this machine is of); without an address on one "
        "that is started for it; engine and package have to be on every node",
    )  # fmt: skip
    group.add_argument(
        "--ray-cores", type=int, default=4, metavar="N",
        help="of each engine there, where there are no GPUs (%(default)s)",
    )  # fmt: skip
    group.add_argument("--slots", type=int, help="sequences that decode together (16; GPU: more)")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of it. Raises InvalidRequest."""
    given = {name: getattr(args, name) for name in _SAMPLING}
    return checked(CaptionFields, given).sampling


def _here(
    args: argparse.Namespace, options: CaptioningOptions, given: list[Part], output: Output
) -> Counts:
    """By an engine of this machine, or a service."""
    with closing(_remote(args) if args.url else _local(args)) as captioner:
        bulk_run = _bulk_run(args, output, captioner.identity)
        print(captioner.where, file=sys.stderr)
        outcomes = Captioning(captioner, options, bulk_run.kept).run(bulk_run.left(items(given)))
        with closing(outcomes), Progress(given) as progress:
            return bulk_run.write(outcomes, progress.show)


def _on_ray(
    args: argparse.Namespace, options: CaptioningOptions, given: list[Part], output: Output
) -> Counts:
    from server.bulk.ray import ClusterOptions, Opening, RayCaptioning, TaskSetup

    opening = Opening(str(args.engine.absolute()), _config(args))
    setup = TaskSetup(opening, args.sampling, options, args.max_pixels, isinstance(output, Tar))
    with closing(RayCaptioning(ClusterOptions(args.ray, args.ray_cores), setup)) as captioning:
        bulk_run = _bulk_run(args, output, captioning.identity)
        bulk_run.counts.before = len(bulk_run.index.keys().sorted)
        print(captioning.where, file=sys.stderr)
        with Progress(given) as progress:
            return bulk_run.write(
                bulk_run.once(captioning.run(given, bulk_run.index)), progress.show
            )


def _bulk_run(args: argparse.Namespace, output: Output, identity: dict[str, str]) -> BulkRun:
    settings = {name: value for name, value in identity.items() if name != "model"}
    varied = args.prompt_column is not None
    made_with = CaptionSettings(identity["model"], settings | args.sampling, args.prompt, varied)
    bulk_run = BulkRun(output, made_with, args.again, args.retry_failed)
    bulk_run.read()
    return bulk_run


def _tell_skipped(given: list[Part], counts: Counts) -> None:
    """What in folders was no image. Raises NoImages if nothing was."""
    skipped: Counter[str] = Counter()
    for part in given:
        skipped += part.skipped if isinstance(part, Files) else Counter()
    if kinds := +skipped:
        names = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SKIPPED))
        more = " and others" if len(kinds) > _SKIPPED else ""
        print(f"skipped what is not named like an image: {names}{more}", file=sys.stderr)
    if not counts.ended and not counts.before:
        names = ", ".join(part.path for part in given)
        raise NoImages(f"{names} holds no images: none ends in {', '.join(SUFFIXES)}")


def _local(args: argparse.Namespace) -> LocalCaptioner:
    open_engine = partial(Engine.open, args.engine, _config(args))
    return LocalCaptioner(open_engine, args.prompt, args.sampling, args.max_pixels)


def _config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(slots=args.slots, provider=args.provider, precision=args.precision)


def _remote(args: argparse.Namespace) -> RemoteCaptioner:
    service = RemoteService.at(args.url, os.environ.get(_KEY), args.model)
    return RemoteCaptioner(service, args.sampling)


if __name__ == "__main__":
    sys.exit(main())
