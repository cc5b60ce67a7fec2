"""Scenarios: processes that are killed, stopped, ended, or can't start."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.reliability.faulty import FAULTS, GREEN, RED
from bench.reliability.images import solid
from bench.reliability.load import Answer, Clients, abandon, counts
from bench.reliability.running import DEMO, Service, Verdict, said, sample, service, wait_for

_ASKED = 4  # requests for each failing image


def kills(long: bool) -> Verdict:
    """SIGKILL the worker in the middle of a batch, again and again, under load."""
    times = 20 if long else 4
    with service() as it:
        over = False
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(
                lambda: asyncio.run(Clients(it.url).closed_loop(sample(), 8, lambda: over))
            )
            recoveries = []
            for _ in range(times):
                time.sleep(1.0)
                pid = it.worker_pid()
                os.kill(pid, signal.SIGKILL)
                start = time.perf_counter()
                wait_for(lambda: (it.ready() or {}) and it.worker_pid() != pid, 30, it.log)  # noqa: B023
                recoveries.append(time.perf_counter() - start)
            time.sleep(1.0)
            over = True
            answers = load.result()
        failed = [a for a in answers if a.caption != said()]
        return Verdict(
            f"{times} kills: {len(failed)} of {len(answers)} requests failed, back after "
            f"{max(recoveries):.1f} s at most, slowest answer "
            f"{max(a.seconds for a in answers):.1f} s",
            not failed,
        )


def stopped_worker(long: bool) -> Verdict:
    """SIGSTOP the worker."""
    with service() as it:
        pid = it.worker_pid()

        async def run() -> tuple[list[Answer], float]:
            clients = Clients(it.url)
            os.kill(pid, signal.SIGSTOP)
            start = time.perf_counter()
            answers = await asyncio.gather(*(clients.caption(sample()) for _ in range(4)))
            return answers, time.perf_counter() - start

        answers, took = asyncio.run(run())
        replaced = it.worker_pid() != pid
        return Verdict(
            f"replaced: {replaced}, {sum(a.caption == said() for a in answers)} of 4 in flight "
            f"answered after {took:.1f} s",
            replaced and all(a.caption == said() for a in answers),
        )


def faults(long: bool) -> Verdict:
    """An exception, NaN, out of memory or a crash on one image among others, asked repeatedly.

    An image that crashes the engine gets two tries, whichever front-ends its requests reach.
    """
    images = [(sample(name), said(name)) for name in ("owl.png", "cats.png", "donuts.png")]
    rounds = 5 if long else 1
    exact = ("--precision", "fp32/fp32/float32")  # 8-bit graphs have no NaN
    with service(*exact, "--front-ends", "2", program="bench.reliability.faulty") as it:

        async def run() -> tuple[list[bool], list[int]]:
            clients, over, fine, failed = Clients(it.url), False, [], []

            async def one(image: bytes, caption: str) -> None:
                while not over:
                    fine.append((await clients.caption(image)).caption == caption)

            others = [asyncio.create_task(one(*images[n % 3])) for n in range(8)]
            for number in range(rounds):
                for blue in FAULTS:
                    # A failed image is known by its hash: a size of its own makes it another.
                    image = solid((RED, GREEN, blue), 32 + number)
                    for _ in range(_ASKED):  # on new connections: either front-end may get them
                        failed.append((await clients.caption(image)).status)
            over = True
            await asyncio.gather(*others)
            return fine, failed

        fine, failed = asyncio.run(run())
        names = ", ".join(name for name, _ in FAULTS.values())
        deaths = int(it.metric("vignette_worker_restarts", worker="0"))
        return Verdict(
            f"{failed.count(500)} of {len(failed)} answered 500 ({names}); "
            f"{fine.count(False)} of {len(fine)} others harmed; {rounds} crashing images, "
            f"{deaths} crashes",
            set(failed) == {500} and all(fine) and bool(fine) and deaths == 2 * rounds,
        )


def sigterm(long: bool) -> Verdict:
    """SIGTERM under load; on another server, a second SIGTERM."""
    with service("--slots", "2") as it:

        async def run() -> tuple[int, list[Answer]]:
            clients = Clients(it.url)
            tasks = [asyncio.create_task(clients.caption(sample())) for _ in range(30)]
            while (accepted := int(it.metric("vignette_requests_inside"))) < 10:
                await asyncio.sleep(0.01)
            it.process.send_signal(signal.SIGTERM)
            return accepted, await asyncio.gather(*tasks)

        accepted, answers = asyncio.run(run())
        found = counts(answers)
        code = it.process.wait(60)
    second = Service()
    try:
        second.wait_ready()
        os.kill(second.worker_pid(), signal.SIGSTOP)
        client = abandon(second.port, sample())
        time.sleep(0.3)
        second.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        start = time.perf_counter()
        second.process.send_signal(signal.SIGTERM)
        second.process.wait(30)
        prompt = time.perf_counter() - start
        client.close()
    finally:
        second.close()
    fine = set(found) <= {200, 503, 0} and found.get(200, 0) >= accepted
    return Verdict(
        f"{accepted} accepted, answers {found}, exit {code}; a second one ends it in "
        f"{prompt:.2f} s",
        fine and code == 0,
        prompt < 2,
    )


def bad_starts(long: bool) -> Verdict:
    """Starts that can't succeed."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as taken:
        corrupt = Path(name) / "engine"
        corrupt.mkdir()
        for path in DEMO.iterdir():
            if path.is_file():
                (corrupt / path.name).symlink_to(path.resolve())
        (corrupt / "weights.data").unlink()
        (corrupt / "weights.data").write_bytes(b"x")
        cases = {
            "no engine": ("--engine", name),
            "corrupt engine": ("--engine", str(corrupt)),
            "port taken": ("--port", str(taken.getsockname()[1])),
            "no such provider": ("--provider", "tensorrt"),
            "key file missing": ("--api-keys", f"{name}/none"),
        }
        slowest, silent = 0.0, []
        for case, flags in cases.items():
            start = time.perf_counter()
            command = [sys.executable, "-m", "server", "--port", "0", *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            slowest = max(slowest, time.perf_counter() - start)
            if done.returncode == 0 or "error: " not in done.stderr or "Traceback" in done.stderr:
                silent.append(f"{case}: {done.returncode}, {done.stderr[-300:]}")
        return Verdict(
            f"{len(cases)} ways, each with a message within {slowest:.1f} s"
            + (f"; but {silent}" if silent else ""),
            not silent,
            slowest < 5,
        )
