"""A bulk run without an engine, in a process that can be killed: `python -m tests.bulk_job`."""

import hashlib
import sys
import time
from itertools import chain

from server.bulk.captioning import Captioning, Plan
from server.bulk.inputs import items, parts
from server.bulk.items import Item, Said
from server.bulk.job import About, Job
from server.bulk.lists import Columns
from server.bulk.outputs import open_output

ABOUT = About("words", {"engine": "none"})


class Words:
    """Says something that depends on the image, some milliseconds later."""

    at_once = 4

    def caption(self, image: bytes, prompt: str | None) -> tuple[Said, ...]:
        time.sleep(0.001)
        return (Said(said_of(image), "stop", -0.5),)

    def stop(self) -> None:
        pass


def said_of(image: bytes) -> str:
    return f'"{hashlib.sha256(image).hexdigest()[:8]}",\nof {len(image)} bytes'


def run(output: str, *inputs: str, wrong: tuple[str, ...] = (), **how) -> Job:
    opened = open_output(output, how.pop("overwrite", False))
    job = Job(opened, ABOUT, how.pop("again", False), how.pop("retry", False))
    try:
        job.read()
        captioning = Captioning(Words(), Plan(None, 10**7, **how), job.kept)
        given = chain(items(parts(inputs, Columns(), 10**7)), (Item(w, wrong=w) for w in wrong))
        job.run(given, captioning.run, lambda told: None)
    finally:
        opened.close()
    return job


if __name__ == "__main__":
    run(*sys.argv[1:])
