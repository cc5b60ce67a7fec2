"""`vignette caption`: caption images in bulk, here or by a service elsewhere.

Inputs are image files, folders, patterns ("photos/**/*.jpg"), lists (.txt, .csv, .jsonl, .parquet),
WebDataset shards (.tar), or - for a list on standard input; all of them also by URL: s3://, gs://,
hf://, https:// and whatever else fsspec knows. A run that was interrupted, or killed, goes on where
it was when the same command is given again. The exit status is 0 if all images have captions, 1 if
any has none, also of an earlier run, 2 for a wrong argument, 130 if interrupted.
"""

import argparse
import errno
import logging
import os
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from typing import Any

from runtime.errors import InvalidRequest, VignetteError
from runtime.model.preprocess import SUFFIXES
from server.bulk.arguments import KEY, SAMPLING_FLAGS, command_line
from server.bulk.captioners.captioning import Captioning, CaptioningOptions, RunFailed
from server.bulk.captioners.engine import EngineSetup
from server.bulk.captioners.local import LocalCaptioner
from server.bulk.captioners.remote import RemoteCaptioner
from server.bulk.captioners.service_client import RemoteService
from server.bulk.inputs.folders import Files
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import NoImages, Part, items, parts
from server.bulk.outputs.base import Output
from server.bulk.outputs.opening import open_output
from server.bulk.outputs.tar import Tar
from server.bulk.progress import Progress
from server.bulk.run import BulkRun, CaptionSettings, Counts
from server.requests.fields import CaptionFields, checked

_SKIPPED = 5  # kinds of skipped files that are listed
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if any image has no caption."""
    parser = command_line(__doc__ or "")
    args = parser.parse_args(arguments)
    if args.ray and (args.ordered or args.dedupe or args.url):
        parser.error("--ordered, --dedupe and --url are for one machine: leave out --ray")
    if args.ray and "-" in args.images:
        parser.error("standard input is of one machine: with --ray name a list that all nodes have")
    if args.ordered and (args.again or args.retry_failed):
        parser.error("rows that are made again come last: leave out --ordered")
    if args.model and not args.url:
        parser.error("--model is of a service's: add its --url, or name a folder with --engine")
    if "-" in args.images and sys.stdin is None:
        parser.error("standard input is closed: give a list to it, or name another input than -")
    try:
        args.sampling = _sampling(args)
    except InvalidRequest as error:
        parser.error(str(error))
    logging.basicConfig(format="%(message)s")
    limit = int(args.max_image_mb * 1e6)
    columns = Columns(args.column, args.prompt_column, args.id_column)
    try:
        given = parts(args.images, columns, limit, args.output)
        options = CaptioningOptions(limit, args.ordered, args.dedupe)
        inputs = [part.path for part in given]
        with closing(open_output(args.output, args.overwrite, inputs)) as output:
            run = _on_ray if args.ray else _here
            counts = run(args, options, given, output)
        _tell_skipped(given, counts)
    except (VignetteError, RunFailed, OSError) as error:  # not of a single image
        full = isinstance(error, OSError) and error.errno in _OF_DISKS and not error.filename
        print(f"error: {args.output}: {error}" if full else f"error: {error}", file=sys.stderr)
        return 1
    except sqlite3.Error as error:
        print(
            f"error: what is done can't be noted in SQLite's temporary folder ({error}): free some "
            "room there, or name another with SQLITE_TMPDIR, then give the same command again",
            file=sys.stderr,
        )
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


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The given sampling parameters. Raises InvalidRequest."""
    given = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    return checked(CaptionFields, given).sampling


def _here(
    args: argparse.Namespace, options: CaptioningOptions, given: list[Part], output: Output
) -> Counts:
    """Caption with an engine on this machine, or with a service."""
    with closing(_remote(args) if args.url else _local(args)) as captioner:
        bulk_run = _bulk_run(args, output, captioner.identity)
        print(captioner.where, file=sys.stderr)
        left = bulk_run.left(items(given, bulk_run.index.drop_error, args.prompt))
        outcomes = Captioning(captioner, options, bulk_run.kept).run(left)
        with closing(outcomes), Progress(given) as progress:
            return bulk_run.write(outcomes, progress.show)


def _on_ray(
    args: argparse.Namespace, options: CaptioningOptions, given: list[Part], output: Output
) -> Counts:
    from server.bulk.captioners.ray import RayCaptioning, TaskSetup

    setup = TaskSetup(
        _setup(args), args.prompt, args.sampling, options.limit, args.max_pixels,
        with_images=isinstance(output, Tar),
    )  # fmt: skip
    with closing(RayCaptioning(args.ray, args.ray_cores, setup)) as captioning:
        bulk_run = _bulk_run(args, output, captioning.identity)
        bulk_run.counts.before = bulk_run.index.done
        print(captioning.where, file=sys.stderr)
        with Progress(given) as progress:
            return bulk_run.write(
                bulk_run.once(captioning.run(given, bulk_run.index, args.again)), progress.show
            )


def _bulk_run(args: argparse.Namespace, output: Output, identity: dict[str, str]) -> BulkRun:
    settings = {name: value for name, value in identity.items() if name != "model"}
    varied = args.prompt_column is not None
    made_with = CaptionSettings(identity["model"], settings | args.sampling, args.prompt, varied)
    bulk_run = BulkRun(output, made_with, args.again, args.retry_failed)
    bulk_run.read()
    return bulk_run


def _tell_skipped(given: list[Part], counts: Counts) -> None:
    """Report files in folders that are no images. Raises NoImages if there were no images."""
    skipped: Counter[str] = Counter()
    for part in given:
        skipped += part.skipped if isinstance(part, Files) else Counter()
    if kinds := +skipped:
        names = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SKIPPED))
        more = " and others" if len(kinds) > _SKIPPED else ""
        print(f"skipped what is not named like an image: {names}{more}", file=sys.stderr)
    if not counts.ended and not counts.before:
        names = ", ".join(part.path for part in given)
        lacks = f"none ends in {', '.join(SUFFIXES)}, and no list or archive names or holds any"
        raise NoImages(f"{names} holds no images: {lacks}")


def _local(args: argparse.Namespace) -> LocalCaptioner:
    return LocalCaptioner(_setup(args), args.prompt, args.sampling, args.max_pixels)


def _setup(args: argparse.Namespace) -> EngineSetup:
    return EngineSetup(args.engine.absolute(), args.slots, args.provider, args.precision)


def _remote(args: argparse.Namespace) -> RemoteCaptioner:
    service = RemoteService.at(args.url, os.environ.get(KEY, "").strip(), args.model)
    return RemoteCaptioner(service, args.sampling)


if __name__ == "__main__":
    sys.exit(main())
