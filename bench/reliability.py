"""`make chaos` and `make soak`: what the service promises, tried on a running one.

Every scenario starts a server of its own as a user would, does something to it, and returns a
figure with its verdict. The short forms run in `make test`; the table of a full run is kept in
`bench/results/reliability.md`.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPResponse
from tornado.simple_httpclient import HTTPTimeoutError, SimpleAsyncHTTPClient

from bench.arithmetic import percentile
from bench.contestants import free_port
from bench.machine import about
from bench.processes import family, open_files, pss

_DEMO, _SAMPLES = Path("engines/demo"), Path("demo/samples")
_TABLE = "reliability.md"
_READY_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out: a figure for people, and whether it is as promised.

    in_time: what the promise says of seconds and rates, which a busy machine can spoil; the tests
    leave it alone.
    """

    figure: str
    passed: bool
    in_time: bool = True


class Service:
    """A server process on a free port."""

    def __init__(self, *flags: str, **variables: str) -> None:
        self.port = free_port()
        handle, self._log = tempfile.mkstemp(prefix="vignette-log-")
        command = [sys.executable, "-m", "server", "--engine", str(_DEMO), "--provider", "cpu",
                   "--port", str(self.port), *flags]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=handle, stderr=handle, env=os.environ | variables
        )
        os.close(handle)
        self.url = f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it has printed so far."""
        return Path(self._log).read_text()

    def ready(self) -> dict[str, Any] | None:
        """/health/ready, or None if it does not answer 200."""
        status, body = get(self.port, "/health/ready")
        return json.loads(body) if status == 200 else None

    def wait_ready(self) -> None:
        """Up to a minute."""
        wait_for(self.ready, _READY_SECONDS, self.log)

    def worker_pid(self) -> int:
        """Of the first worker."""
        found = wait_for(self.ready, _READY_SECONDS, self.log)
        return int(found["workers"][0]["pid"])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples whose line begins with `name`."""
        lines = get(self.port, "/metrics")[1].decode().splitlines()
        return sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith(name))

    def resident(self) -> int:
        """Bytes of all its processes, shared pages counted once (PSS)."""
        return sum(pss(pid) for pid in family(self.process.pid))

    def close(self) -> int:
        """End it as an operator would; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            Path(self._log).unlink()


@contextlib.contextmanager
def service(*flags: str) -> Iterator[Service]:
    """A server that is ready."""
    started = Service(*flags)
    try:
        started.wait_ready()
        yield started
    finally:
        started.close()


def wait_for(condition: Callable[[], Any], seconds: float, log: Callable[[], str] = str) -> Any:
    """The first true value of `condition`; RuntimeError, with the log, after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds} s in vain: {log()[-2000:]}")
        time.sleep(0.02)
    return found


def get(port: int, path: str) -> tuple[int, bytes]:
    """One GET; status 0 if nobody answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            client.sendall(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
            answer = b"".join(iter(lambda: client.recv(65536), b""))
    except OSError:
        return 0, b""
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split()
    return (int(words[1]) if len(words) > 1 else 0), body


def sample(name: str = "owl.png") -> bytes:
    """One of the committed samples."""
    return (_SAMPLES / name).read_bytes()


def said(name: str = "owl.png") -> str:
    """Its caption."""
    return json.loads((_SAMPLES / "captions.json").read_text())[name]["caption"]


# --- Load ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """Of one request: status (0: no answer at all), seconds, caption if there is one, headers."""

    status: int
    seconds: float
    caption: str | None = None
    retry_after: str | None = None


class Clients:
    """Sends requests from an event loop. One is made and used within `asyncio.run`."""

    def __init__(self, url: str, at_once: int = 4096) -> None:
        self._url = url
        self._http: AsyncHTTPClient = SimpleAsyncHTTPClient(
            force_instance=True, max_clients=at_once
        )

    async def caption(self, image: bytes, query: str = "", seconds: float = 90) -> Answer:
        """Post an image."""
        start = time.perf_counter()
        try:
            response: HTTPResponse = await self._http.fetch(
                f"{self._url}/caption{query}", method="POST", body=image, raise_error=False,
                request_timeout=seconds, connect_timeout=seconds,
                headers={"Content-Type": "image/png"},
            )  # fmt: skip
        except (OSError, HTTPTimeoutError, HTTPClientError):
            return Answer(0, time.perf_counter() - start)
        took = time.perf_counter() - start
        if response.code == 200:
            return Answer(200, took, json.loads(response.body)["caption"])
        status = 0 if response.code == 599 else response.code
        return Answer(status, took, retry_after=response.headers.get("Retry-After"))

    async def closed_loop(
        self, image: bytes, count: int, until: Callable[[], bool]
    ) -> list[Answer]:
        """`count` clients, each sending its next request when the last is answered."""
        answers: list[Answer] = []

        async def one() -> None:
            while not until():
                answers.append(await self.caption(image))

        await asyncio.gather(*(one() for _ in range(count)))
        return answers

    async def open_loop(self, image: bytes, rate: float, seconds: float) -> list[Answer]:
        """Poisson arrivals at `rate` a second, whatever happens to them."""
        rng, tasks = random.Random(1), []
        start = due = time.perf_counter()
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.caption(image)))
            due += rng.expovariate(rate)
        return await asyncio.gather(*tasks)


def after(seconds: float) -> Callable[[], bool]:
    """A condition that is true once so many seconds have passed."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def counts(answers: list[Answer]) -> dict[int, int]:
    """Answers by status."""
    found: dict[int, int] = {}
    for answer in answers:
        found[answer.status] = found.get(answer.status, 0) + 1
    return found


# --- Scenarios -----------------------------------------------------------------------------------


def overload(long: bool) -> Verdict:
    """1: open loop at twice the capacity."""
    seconds = 600 if long else 20
    image = sample()
    exact = ("--precision", "fp32/fp32/float32")  # a caption that costs something
    with service("--timeout-seconds", "10", "--max-queue", "64", *exact) as it:

        async def run() -> tuple[float, int, list[Answer]]:
            clients = Clients(it.url)
            await clients.closed_loop(image, 80, after(2))
            measured = await clients.closed_loop(image, 16, after(5))
            peak, before = len(measured) / 5, it.resident()
            return peak, before, await clients.open_loop(image, 2 * peak, seconds)

        peak, before, answers = asyncio.run(run())
        grown = (it.resident() - before) / 2**20
        refused = [a for a in answers if a.status == 429]
        accepted = [a for a in answers if a.status == 200]
        goodput = len(accepted) / seconds
        slowest = percentile([a.seconds for a in refused], 0.99) if refused else 0.0
        p99 = percentile([a.seconds for a in accepted], 0.99)
        others = len(answers) - len(refused) - len(accepted)
        told = all(a.retry_after and int(a.retry_after) >= 1 for a in refused)
        figure = (
            f"{len(answers)} requests at {2 * peak:.0f}/s: goodput {goodput / peak:.0%} of the "
            f"peak, refusals p99 {slowest * 1e3:.0f} ms, accepted p99 {p99:.2f} s, {others} other, "
            f"memory {grown:+.0f} MiB"
        )
        good = bool(accepted) and bool(refused) and p99 <= 10.5 and not others and told
        in_time = goodput >= 0.9 * peak and slowest < 0.05 and p99 <= 10
        return Verdict(figure, good and grown < 32, in_time)


def full_queue(long: bool) -> Verdict:
    """2: a queue of N, N + k sent behind a stopped worker."""
    queue, extra = 8, 5
    flags = ("--slots", "1", "--max-queue", str(queue))
    with service(*flags) as it:
        os.kill(it.worker_pid(), signal.SIGSTOP)

        async def run() -> list[Answer]:
            clients = Clients(it.url)
            return await asyncio.gather(
                *(clients.caption(sample()) for _ in range(1 + queue + extra))
            )

        answers = asyncio.run(run())
        found = counts(answers)
        counted = it.metric('vignette_requests_total{outcome="queue_full"}')
        return Verdict(
            f"{found.get(429, 0)} of {1 + queue + extra} refused, counter {counted:.0f}, "
            f"{found.get(200, 0)} captioned",
            found == {200: 1 + queue, 429: extra} and counted == extra,
        )


def deadline_in_the_queue(long: bool) -> Verdict:
    """3: the deadline passes in the queue."""
    with service("--slots", "1") as it:
        encoded = it.metric("vignette_encode_batch_images_sum")
        os.kill(it.worker_pid(), signal.SIGSTOP)

        async def run() -> list[Answer]:
            clients = Clients(it.url)
            return await asyncio.gather(
                *(clients.caption(sample(), "?timeout_ms=400") for _ in range(4))
            )

        answers = asyncio.run(run())
        it.wait_ready()
        time.sleep(0.5)
        executed = it.metric("vignette_encode_batch_images_sum") - encoded
        found = counts(answers)
        return Verdict(f"{found.get(504, 0)} of 4 answered 504, {executed:.0f} executed",
                       found == {504: 4} and executed == 0)  # fmt: skip


def disconnects(long: bool) -> Verdict:
    """4: clients leave while they are queued and mid-decode; the others' captions stay."""
    names = ("owl.png", "eagle-shark.png", "donuts.png")
    with service("--slots", "4") as it:

        async def run() -> list[bool]:
            clients = Clients(it.url)
            right = []
            for _ in range(20 if long else 5):
                leaving = [abandon(it.port, sample()) for _ in range(8)]
                staying = asyncio.gather(*(clients.caption(sample(name)) for name in names))
                await asyncio.sleep(0.01)
                for client in leaving:
                    client.close()
                answers = await staying
                right += [a.caption == said(n) for a, n in zip(answers, names, strict=True)]
            return right

        right = asyncio.run(run())
        wait_for(lambda: it.metric("vignette_requests_inside") == 0, 10, it.log)
        left = it.metric("vignette_running_rows") + it.metric("vignette_queue_length")
        return Verdict(f"{sum(right)} of {len(right)} others right, {left:.0f} slots still taken",
                       all(right) and left == 0)  # fmt: skip


def abandon(port: int, image: bytes, kind: str = "image/png") -> socket.socket:
    """A client that has sent its request and does not wait."""
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    client.sendall(f"{head}Content-Length: {len(image)}\r\n\r\n".encode() + image)
    return client


def resets(long: bool) -> Verdict:
    """5: a thousand clients reset together, five times."""
    clients, rounds = (1000, 5) if long else (200, 3)
    with service() as it:
        for _ in range(rounds):
            open_ = []
            for _ in range(clients):
                client = abandon(it.port, sample())
                # Close with a reset instead of the usual farewell.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                open_.append(client)
            for client in open_:
                client.close()
        answer = asyncio.run(_one(it))
        return Verdict(
            f"after {rounds} x {clients} resets the next answers {answer.status} in "
            f"{answer.seconds * 1e3:.0f} ms",
            answer.caption == said(),
        )


async def _one(it: Service, image: bytes | None = None, query: str = "") -> Answer:
    return await Clients(it.url).caption(image or sample(), query)


def kills(long: bool) -> Verdict:
    """6: SIGKILL the worker in the middle of a batch, again and again, under load."""
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
    """7: SIGSTOP the worker."""
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


def sigterm(long: bool) -> Verdict:
    """9: SIGTERM under load, then a second SIGTERM on another."""
    with service("--slots", "2") as it:

        async def run() -> list[Answer]:
            clients = Clients(it.url)
            tasks = [asyncio.create_task(clients.caption(sample())) for _ in range(30)]
            while it.metric("vignette_requests_inside") < 10 and not all(t.done() for t in tasks):
                await asyncio.sleep(0.01)
            it.process.send_signal(signal.SIGTERM)
            return await asyncio.gather(*tasks)

        found = counts(asyncio.run(run()))
        code = it.process.wait(60)
    second = Service()
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
    fine = set(found) <= {200, 503, 0} and found.get(200, 0) >= 10
    return Verdict(
        f"answers {found}, exit {code}; a second one ends it in {prompt:.2f} s",
        fine and code == 0,
        prompt < 2,
    )


def slow_clients(long: bool) -> Verdict:
    """10: slow heads and slow bodies beside normal load."""
    each, rounds, seconds = (500, 3, 5.0) if long else (50, 1, 2.0)
    limit = str(seconds + 1)  # so that they are there all the time
    with service("--header-seconds", limit, "--body-seconds", limit) as it:

        def p99() -> float:
            answers = asyncio.run(Clients(it.url).closed_loop(sample(), 2, after(seconds)))
            return percentile([a.seconds for a in answers], 0.99)

        p99()
        cut, alone, beside = 0, [], []
        for _ in range(rounds):
            alone.append(p99())
            slow = [socket.create_connection(("127.0.0.1", it.port)) for _ in range(2 * each)]
            for n, client in enumerate(slow):
                client.sendall(
                    b"POST /caption HTTP/1.1\r\nHo"
                    if n % 2
                    else b"POST /caption HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\n\r\nx"
                )
            beside.append(p99())
            time.sleep(2)
            cut += sum(_is_closed(client) for client in slow)
            for client in slow:
                client.close()
        usual, then = statistics.median(alone), statistics.median(beside)
        return Verdict(
            f"{cut} of {2 * each * rounds} cut off; p99 of the others {then * 1e3:.0f} ms, alone "
            f"{usual * 1e3:.0f} ms",
            cut == 2 * each * rounds,
            then <= 1.1 * usual,
        )


def _is_closed(client: socket.socket) -> bool:
    client.settimeout(5)
    try:
        while data := client.recv(4096):
            if b"Connection: close" in data:
                return True
    except ConnectionError:
        return True
    except OSError:
        return False
    return True


def oversized(long: bool) -> Verdict:
    """11: too large by length, in chunks, by a million chunks, compressed."""
    with service("--max-body-bytes", "100000") as it:
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        tiny = b"1\r\nx\r\n" * (1_000_000 if long else 200_000)
        kinds = (
            b"Content-Length: 90000000\r\n\r\n" + b"x" * 1000,
            b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8 + b"0\r\n\r\n",
            b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b" + b"x" * 18,
        )
        chunked = b"Transfer-Encoding: chunked\r\n\r\n" + tiny
        for kind in (*kinds * 10, chunked):
            _raw(it.port, kind)  # to warm up
        statuses = []
        before = it.resident()
        for _ in range(100 if long else 40):
            statuses += [_raw(it.port, kind) for kind in kinds]
        statuses.append(_raw(it.port, chunked))
        time.sleep(0.5)
        grown = (it.resident() - before) / 2**20 / (len(statuses) / 100)
        # Far beyond the limit the server hangs up, and the client may see that before the answer.
        fine = all(400 <= status < 500 for status in statuses[:-1]) and statuses[-1] in (0, 413)
        good = asyncio.run(_one(it)).caption == said()
        return Verdict(
            f"{len(statuses)} requests, answers {sorted(set(statuses))}; {grown:.2f} MiB grown "
            "per 100",
            fine and good and grown < 1,
        )


def _raw(port: int, rest: bytes) -> int:
    """Status of a request that is written by hand."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"POST /caption HTTP/1.1\r\nHost: x\r\n" + rest)
        try:
            answer = client.recv(65536)
        except OSError:
            return 0
    words = answer.split()
    return int(words[1]) if len(words) > 1 else 0


def broken_images(long: bool) -> Verdict:
    """12: bombs, mutants of every format, and odd but whole images."""
    rng = np.random.default_rng(7)
    with service("--timeout-seconds", "60") as it:
        before = it.worker_pid()
        cases = [(n, bomb(side)) for n, side in (("bomb", 19_000), ("bomb", 13_000))]
        cases += [("mutant", m) for m in mutants(rng, 1000 if long else 120)]
        whole = odd_images()

        async def run() -> tuple[list[tuple[str, Answer]], float]:
            clients = Clients(it.url)
            slowest = 0.0
            done = False

            async def watch() -> None:
                """How late the event loop answers what costs it nothing."""
                nonlocal slowest
                while not done:
                    start = time.perf_counter()
                    await asyncio.to_thread(get, it.port, "/health/live")
                    slowest = max(slowest, time.perf_counter() - start)
                    await asyncio.sleep(0.02)

            watcher = asyncio.create_task(watch())
            answers = []
            everything = [*cases, *(("whole", image) for image in whole)]
            for start in range(0, len(everything), 8):
                some = everything[start : start + 8]
                found = await asyncio.gather(*(clients.caption(image) for _, image in some))
                answers += [(kind, a) for (kind, _), a in zip(some, found, strict=True)]
            done = True
            await watcher
            return answers, slowest

        answers, slowest = asyncio.run(run())
        wrong = [k for k, a in answers if a.status == 0 or a.status >= 500]
        bombs = {a.status for k, a in answers if k == "bomb"}
        rejected = [k for k, a in answers if k == "whole" and a.status != 200]
        same = it.worker_pid() == before
        return Verdict(
            f"{len(answers)} files: {len(wrong)} answered 5xx or not at all, {len(rejected)} whole "
            f"ones refused, bombs {bombs}, worker untouched: {same}, /health/live within "
            f"{slowest * 1e3:.0f} ms",
            not wrong and not rejected and same and bombs == {422},
        )


def bomb(side: int) -> bytes:
    """A small PNG of side x side black pixels."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def mutants(rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Files of every format, with bytes changed or the end cut off."""
    picture = Image.open(io.BytesIO(sample())).convert("RGB")
    formats = []
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        picture.save(buffer, name)
        formats.append(buffer.getvalue())
    for n in range(count):
        data = bytearray(formats[n % len(formats)])
        if rng.random() < 0.3:
            yield bytes(data[: int(rng.integers(1, len(data)))])
            continue
        for place in rng.integers(0, len(data), int(rng.integers(1, 30))):
            data[place] = int(rng.integers(0, 256))
        yield bytes(data)


def odd_images() -> list[bytes]:
    """Whole images of unusual kinds."""
    picture = Image.open(io.BytesIO(sample())).convert("RGB")
    found = []
    for image, name, options in (
        (Image.new("RGB", (1, 1), "red"), "PNG", {}),
        (picture.convert("CMYK"), "JPEG", {}),
        (Image.fromarray(np.full((64, 64), 40_000, np.uint16)), "PNG", {}),
        (picture, "GIF", {"save_all": True, "append_images": [picture.rotate(90)]}),
        (picture.convert("P"), "PNG", {}),
        (picture.convert("LA"), "PNG", {}),
        (picture.convert("1"), "TIFF", {}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, name, **options)
        found.append(buffer.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    return [*found, buffer.getvalue()]


TRICKS = (
    "https://169.254.169.254/latest/meta-data/",
    "https://[::1]/x.png",
    "https://[::ffff:127.0.0.1]/x.png",
    "https://2130706433/x.png",
    "https://0177.0.0.1/x.png",
    "https://127.1/x.png",
    "https://localhost/x.png",
    "https://localhost./x.png",
    "https://allowed.example@localhost/x.png",
    "https://allowed.example:22/x.png",
    "https://allowed.example\\@localhost/x.png",
    "http://allowed.example/x.png",
    "file:///etc/passwd",
    "https://not-allowed.example/x.png",
    "https://",
    "ftp://allowed.example/x",
)


def url_tricks(long: bool) -> Verdict:
    """13: image_url to where it must not lead; even private hosts that somebody allowed."""
    allowed = "allowed.example,localhost,127.0.0.1,127.1,0177.0.0.1,2130706433,169.254.169.254,::1"
    with (
        service("--image-url-domains", allowed) as it,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        port = listener.getsockname()[1]
        tricks = (*TRICKS, f"https://127.0.0.1:{port}/x.png", f"https://localhost:{port}/x.png")
        found = {url: _post_json(it.port, {"image_url": url}) for url in tricks}
        listener.settimeout(0.2)
        try:
            listener.accept()
            reached = True
        except TimeoutError:
            reached = False
        passed = [url for url, code in found.items() if code != "forbidden_url"]
        return Verdict(
            f"{len(tricks) - len(passed)} of {len(tricks)} refused, private connection made: "
            f"{reached}" + (f"; not refused: {passed}" if passed else ""),
            not passed and not reached,
        )


def _post_json(port: int, fields: dict[str, Any]) -> str:
    """The error code that is answered."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/caption", json.dumps(fields).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.status)
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]["code"]


def bad_starts(long: bool) -> Verdict:
    """14: starts that can't succeed."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as taken:
        corrupt = Path(name) / "engine"
        corrupt.mkdir()
        for path in _DEMO.iterdir():
            if path.is_file():
                (corrupt / path.name).symlink_to(path.resolve())
        (corrupt / "encoder.data").unlink()
        (corrupt / "encoder.data").write_bytes(b"x")
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


def fuzzing(long: bool) -> Verdict:
    """15: schemathesis against the OpenAPI document."""
    examples = "2000" if long else "30"
    with service() as it:
        asyncio.run(_one(it))
        before, files = it.resident(), open_files(it.process.pid)
        tool = [str(Path(sys.executable).with_name("schemathesis")), "run",
                f"{it.url}/openapi.json", "--max-examples", examples, "--seed", "1",
                "--checks", "not_a_server_error", "--no-color"]  # fmt: skip
        done = subprocess.run(tool, capture_output=True, text=True, check=False)
        match = re.search(r"(\d+) generated", done.stdout)
        good = asyncio.run(_one(it)).caption == said()
        grown = (it.resident() - before) / 2**20
        more = open_files(it.process.pid) - files
        return Verdict(
            f"{match.group(1) if match else 'no'} requests, "
            + ("no 5xx" if done.returncode == 0 else f"failures: {done.stdout[-600:]}")
            + f"; memory {grown:+.0f} MiB, file handles {more:+}",
            done.returncode == 0 and match is not None and good and grown < 32 and more <= 8,
        )


def soak(long: bool) -> Verdict:
    """16: an hour of mixed load, good and bad."""
    seconds = 3600 if long else 10
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


SCENARIOS: dict[str, tuple[int, Callable[[bool], Verdict]]] = {
    "twice the capacity, open loop": (1, overload),
    "a full queue": (2, full_queue),
    "a deadline in the queue": (3, deadline_in_the_queue),
    "clients that leave": (4, disconnects),
    "clients that reset together": (5, resets),
    "SIGKILL of the worker under load": (6, kills),
    "SIGSTOP of the worker": (7, stopped_worker),
    "SIGTERM under load, and a second": (9, sigterm),
    "slow heads and bodies": (10, slow_clients),
    "oversized bodies": (11, oversized),
    "bombs, mutants, odd images": (12, broken_images),
    "image_url tricks": (13, url_tricks),
    "starts that can't succeed": (14, bad_starts),
    "schemathesis": (15, fuzzing),
    "mixed load for an hour": (16, soak),
}


def main() -> int:
    """Run scenarios, print and keep the table; status 1 if one is not as promised."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help="of scenarios (default: all)")
    parser.add_argument("--without", type=int, nargs="*", default=[], help="numbers to leave out")
    parser.add_argument("--short", action="store_true", help="the short forms, as in make test")
    parser.add_argument("--output", type=Path, default=Path("bench/results"))
    parser.add_argument("--called", default="python -m bench.reliability")
    args = parser.parse_args()
    rows, failed = [], False
    for name, (number, scenario) in SCENARIOS.items():
        if number in args.without or (args.numbers and number not in args.numbers):
            continue
        try:
            verdict = scenario(not args.short)
        except Exception as error:  # of any kind: the other scenarios are still worth running
            verdict = Verdict(f"{type(error).__name__}: {error}", False)
        as_promised = verdict.passed and verdict.in_time
        failed |= not as_promised
        word = "as promised" if as_promised else "NOT as promised"
        print(f"{number:2} {name}: {verdict.figure} ({word})", flush=True)
        rows.append(f"| {number} | {name} | {verdict.figure} | {word} |")
    facts = about()
    head = (
        f"`{args.called}` on {datetime.now(UTC):%Y-%m-%d}, commit {facts['commit']}, "
        f"{facts['machine']}; the demo engine."
    )
    table = ["# What the service promises, tried", "", head, "",
             "| | scenario | came out | |", "| --- | --- | --- | --- |", *rows, ""]  # fmt: skip
    if not args.numbers and not args.short:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / _TABLE).write_text("\n".join(table))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
