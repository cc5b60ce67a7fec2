"""Bulk runs without an engine; `python -m tests.support.bulk_job` kills some at random moments."""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow.parquet

from server.bulk.captioners.captioning import Captioning, CaptioningOptions
from server.bulk.inputs.items import Item, ScoredCaption
from server.bulk.inputs.lists import Columns
from server.bulk.inputs.parts import items, parts
from server.bulk.outputs.opening import open_output
from server.bulk.run import BulkRun, CaptionSettings

ABOUT = CaptionSettings("words", {"engine": "none"})
NO_COLUMNS = Columns()


class Words:
    """Captions an image by its hash, a millisecond later."""

    at_once = 4

    def caption(self, image: bytes, prompt: str | None) -> tuple[ScoredCaption, ...]:
        time.sleep(0.001)
        return (ScoredCaption(said_of(image), "stop", -0.5),)

    def stop(self) -> None:
        pass


def said_of(image: bytes) -> str:
    return f'"{hashlib.sha256(image).hexdigest()[:8]}",\nof {len(image)} bytes'


def run(
    output: str, *inputs: str, wrong=(), begun=lambda: None, columns=NO_COLUMNS, **how
) -> BulkRun:
    opened = open_output(output, how.pop("overwrite", False), inputs)
    job = BulkRun(
        opened,
        replace(ABOUT, varied=columns.prompt is not None),
        how.pop("again", False),
        how.pop("retry", False),
    )
    try:
        job.read()
        begun()
        captioning = Captioning(Words(), CaptioningOptions(10**7, **how), job.kept)
        found = items(parts(inputs, columns, 10**7), job.index.drop_error)
        given = chain(found, (Item(w, wrong=w) for w in wrong))
        job.write(captioning.run(job.left(given)), lambda told: None)
    finally:
        opened.close()
    return job


def rows_of(output: str) -> list[dict]:
    """Read rows as a user of each format would."""
    path = Path(output)
    match path.suffix:
        case ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()]
        case ".csv":
            with path.open(newline="") as stream:
                return list(csv.DictReader(stream))
        case ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        case ".tar":
            return [json.loads(data) for name, data in members(path) if name.endswith(".json")]
    rows = [json.loads(line) for line in (path / ".vignette.jsonl").read_text().splitlines()]
    for row in rows:
        if "caption" in row:
            assert (path / row["text"]).read_text() == row["caption"]
    return rows


def members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        return [(m.name, archive.extractfile(m).read()) for m in archive]


def check(output: str, photos: Path) -> None:
    """Every photo has exactly one row, with the right caption."""
    rows = rows_of(output)
    assert Counter(row["id"] for row in rows) == dict.fromkeys(map(str, photos.rglob("*.png")), 1)
    for row in rows:
        assert row["caption"] == said_of(Path(row["id"]).read_bytes())


def killed(times: int, output: str, photos: Path) -> int:
    """Kill `times` runs, each at a random moment of its work. Runs that end before they are killed
    are checked, and their output is removed.
    """
    chance, done = random.Random(output), 0
    while done < times:
        reading, writing = os.pipe()
        if not (child := os.fork()):
            run(output, str(photos), begun=partial(os.write, writing, b"."))
            os._exit(0)
        os.close(writing)
        assert os.read(reading, 1), "it ended before it began"
        time.sleep(chance.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reading)
        if os.WIFSIGNALED(status):
            done += 1
        else:
            assert status == 0
            check(output, photos)
            shutil.rmtree(output) if output.endswith("/") else Path(output).unlink()
    return done


if __name__ == "__main__":
    times, output, photos = sys.argv[1:]
    print(f"{killed(int(times), output, Path(photos))} killed")
