"""Scenarios: fuzzing, and an hour of mixed load."""

import asyncio
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.common.processes import open_files
from bench.reliability.images import mutants
from bench.reliability.load import Clients, abandon, after, one_caption
from bench.reliability.running import Verdict, said, sample, service


def fuzzing(long: bool) -> Verdict:
    """Run schemathesis against the OpenAPI document."""
    examples = "2000" if long else "12"
    with service() as it:
        asyncio.run(one_caption(it))
        before, files = it.resident(), open_files(it.process.pid)
        settings = str(Path(__file__).with_name("schemathesis.toml"))
        tool = [str(Path(sys.executable).with_name("schemathesis")),
                "--config-file", settings, "run",
                f"{it.url}/openapi.json", "--max-examples", examples, "--seed", "1",
                "--checks", "not_a_server_error", "--no-color"]  # fmt: skip
        done = subprocess.run(tool, capture_output=True, text=True, check=False)
        match = re.search(r"(\d+) generated", done.stdout)
        good = asyncio.run(one_caption(it)).caption == said()
        grown = (it.resident() - before) / 2**20
        more = open_files(it.process.pid) - files
        return Verdict(
            f"{match.group(1) if match else 'no'} requests, "
            + ("no 5xx" if done.returncode == 0 else f"failures: {_first(done.stdout)}")
            + f"; memory {grown:+.0f} MiB, file handles {more:+}",
            done.returncode == 0 and match is not None and good and grown < 32 and more <= 8,
        )


def _first(report: str) -> str:
    """The first failure that schemathesis reports; the end of its report if it names none."""
    _, named, failures = report.partition("FAILURES")
    return failures[:1500] if named else report[-600:]


def soak(long: bool) -> Verdict:
    """An hour of mixed load, valid and invalid."""
    seconds = 3600 if long else 4
    good = [(sample(name), said(name)) for name in ("owl.png", "cats.png", "donuts.png")]
    bad = list(mutants(np.random.default_rng(1), 60))
    with service() as it:

        async def run(duration: float) -> list[bool]:
            clients, end, fine = Clients(it.url), after(duration), []

            async def one(n: int) -> None:
                rng = random.Random(n)
                while not end():
                    if rng.random() < 0.2:
                        answer = await clients.caption(rng.choice(bad))
                        fine.append(0 < answer.status < 500)
                    elif rng.random() < 0.05:
                        abandon(it.port, good[0][0]).close()
                    else:
                        image, caption = rng.choice(good)
                        fine.append((await clients.caption(image)).caption == caption)

            await asyncio.gather(*(one(n) for n in range(8)))
            return fine

        asyncio.run(run(min(30, seconds / 2)))
        before, files = it.resident(), open_files(it.process.pid)
        fine = asyncio.run(run(seconds))
        time.sleep(1)
        grown = (it.resident() - before) / 2**20
        more = open_files(it.process.pid) - files
        return Verdict(
            f"{len(fine)} requests in {seconds} s, {fine.count(False)} not as they should be; "
            f"memory {grown:+.0f} MiB, file handles {more:+}",
            all(fine) and grown < 32 and more <= 8,
        )
