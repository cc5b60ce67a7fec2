"""Scenarios: a hostile environment: files, folders, ports, logs, signals."""

import asyncio
import contextlib
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.common.processes import command_line, family, runs_engine
from bench.contestants.servers import free_port
from bench.reliability.attacks import post
from bench.reliability.crafted import tags
from bench.reliability.images import ambiguous
from bench.reliability.load import Clients, after, one_caption
from bench.reliability.running import (
    Service,
    Verdict,
    command,
    get,
    said,
    sample,
    service,
    wait_for,
)

_IDLE = 1100
_OWN_ROOM = ("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc")


def _started(what: list[str]) -> subprocess.Popen[str]:
    """Start a process whose stderr nobody reads while it runs."""
    return subprocess.Popen(what, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def idle_connections(long: bool) -> Verdict:
    """More idle connections than the service may open files."""
    with service() as it, contextlib.ExitStack() as held:
        for pid in family(it.process.pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 1024))
        for pid in family(it.process.pid)[1:]:  # their replacements inherit the limit
            os.kill(pid, signal.SIGKILL)
        wait_for(it.ready, 60, it.log)
        wait_for(lambda: asyncio.run(one_caption(it)).caption == said(), 60, it.log)
        for _ in range(_IDLE):
            held.enter_context(socket.create_connection(("127.0.0.1", it.port)))
        answers = [asyncio.run(one_caption(it)) for _ in range(5)]
        right = sum(a.caption == said() for a in answers)
        time.sleep(10 if long else 1)
        size = len(it.log())
        return Verdict(
            f"{right} of {len(answers)} captioned beside {_IDLE} idle connections at 1,024 files, "
            f"{size / 1024:.0f} KiB of log",
            right == len(answers) and size < 100_000,
        )


def second_instance(long: bool) -> Verdict:
    """A second service starts in a container that shares the first one's memory."""
    with service() as first:
        apart = "unshare --pid --fork" if os.geteuid() == 0 else "env"
        second = _started([*apart.split(), *command(0)])
        time.sleep(4)
        runs = second.poll() is None
        pid = first.worker_pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: (first.ready() or {}) and first.worker_pid() != pid, 30, first.log)
        answer = asyncio.run(one_caption(first))
        for process in reversed(family(second.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        second.communicate()
        return Verdict(
            f"({apart.split(maxsplit=1)[0]}) the first recovers from a killed worker and answers "
            f"{answer.status}{'' if runs else '; the second does not run'}",
            answer.caption == said() and runs,
        )


def killed_while_asked(long: bool) -> Verdict:
    """The worker is killed repeatedly for a while, under requests for one image."""
    seconds = 40 if long else 6
    with service() as it:
        end = after(seconds)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(lambda: asyncio.run(Clients(it.url).closed_loop(sample(), 1, end)))
            kills = 0
            while not end():
                with contextlib.suppress(RuntimeError, ProcessLookupError):
                    os.kill(it.worker_pid(), signal.SIGKILL)
                    kills += 1
                time.sleep(0.3)
            answers = asking.result()
        wait_for(it.ready, 30, it.log)
        answer = asyncio.run(one_caption(it))
        failed = sum(a.caption != said() for a in answers)
        return Verdict(
            f"{kills} kills, {failed} of {len(answers)} answers failed meanwhile; afterwards the "
            f"image is answered {answer.status}",
            answer.caption == said(),
        )


def same_port(long: bool) -> Verdict:
    """Two servers start on one port at the same time."""
    rounds = 5 if long else 2
    shared = 0
    for _ in range(rounds):
        port = free_port()
        both = [_started(command(port)) for _ in range(2)]
        wait_for(lambda: any(p.poll() is not None for p in both), 60)  # noqa: B023
        loser = next(p for p in both if p.poll() is not None)
        said_so = "choose another with --port" in (loser.stderr.read() if loser.stderr else "")
        winner = both[1 - both.index(loser)]
        wait_for(lambda: get(port, "/health/ready")[0] == 200, 60)  # noqa: B023
        shared += not (said_so and loser.returncode == 1 and winner.poll() is None)
        winner.send_signal(signal.SIGTERM)
        for process in both:
            process.communicate()
    return Verdict(
        f"{shared} of {rounds} times both served, or the reason was not said", not shared
    )


def unread_log(long: bool) -> Verdict:
    """Nobody reads the log, and requests fill it."""
    port = free_port()
    process = _started(command(port, "--access-log"))
    wait_for(lambda: get(port, "/health/ready")[0] == 200, 60)
    count = 2000 if long else 400
    answered = sum(get(port, f"/{'x' * 900}{n}")[0] == 404 for n in range(count))
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    took = time.perf_counter() - start
    assert process.stderr is not None
    process.stderr.close()
    return Verdict(
        f"{answered} of {count} requests answered, SIGTERM ends it with {code} in {took:.1f} s",
        answered == count and code == 0,
        took < 15,
    )


def full_memory(long: bool) -> Verdict:
    """Shared memory is full while the service runs, and its worker dies."""
    if subprocess.run([*_OWN_ROOM, "true"], capture_output=True, check=False).returncode:
        return Verdict("this system lets nobody have a /dev/shm of their own", None)
    port = free_port()
    inside = (
        "mount -t tmpfs -o size=96m tmpfs /dev/shm && "
        f"exec {shlex.join(command(port, '--max-queue', '64'))}"
    )
    process = _started([*_OWN_ROOM, "sh", "-c", inside])
    try:
        wait_for(lambda: get(port, "/health/ready")[0] == 200, 60)
        server = family(process.pid)[1]
        shm = Path("/proc", str(server), "root", "dev", "shm")  # the server's own /dev/shm
        room = shutil.disk_usage(shm).free
        with contextlib.suppress(OSError), (shm / "filled").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room - 4096)
            file.write(bytes(2**20))
        fine = 0
        for round_ in range(3):
            for _ in range(20):
                answer = post(port, b"Content-Type: image/png", sample())
                fine += answer.startswith(b"HTTP/1.1 200")
            if round_ < 2:
                worker = _worker(process.pid)
                os.kill(worker, signal.SIGKILL)
                wait_for(lambda: _worker(process.pid) != worker, 60)  # noqa: B023
                wait_for(lambda: get(port, "/health/ready")[0] == 200, 60)
        return Verdict(f"{fine} of 60 captioned with /dev/shm full, two workers killed", fine == 60)
    finally:
        for pid in reversed(family(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def _worker(pid: int) -> int:
    """Process id of a service's engine worker in this PID namespace; 0 if there is none."""
    return next((p for p in family(pid) if runs_engine(p)), 0)


def wild_settings(long: bool) -> Verdict:
    """Settings that exceed the machine."""
    refused = []
    for flag, value in (("--slots", "100000"), ("--max-queue", "1000000"), ("--decoders", "2000")):
        given = command(0, flag, value)
        done = subprocess.run(given, capture_output=True, text=True, check=False, timeout=60)
        refused.append(done.returncode == 1 and f"{flag}: " in done.stderr)
    with service("--max-queue", "45000") as it:
        answers = [asyncio.run(one_caption(it)) for _ in range(3)]
        served = sum(a.caption == said() for a in answers)
    return Verdict(
        f"{sum(refused)} of {len(refused)} refused by name; with a queue of 45,000 {served} of "
        f"{len(answers)} captioned",
        all(refused) and served == len(answers),
    )


def neighbours(long: bool) -> Verdict:
    """Ambiguous images, alone and among others, in 8 bits."""
    rng, count = np.random.default_rng(3), 600 if long else 60
    images = [ambiguous(rng) for _ in range(count)]
    with service("--precision", "int8/int8/int8") as it:

        async def run(at_once: int) -> list[str | None]:
            clients, gate = Clients(it.url), asyncio.Semaphore(at_once)

            async def one(image: bytes) -> str | None:
                async with gate:
                    return (await clients.caption(image)).caption

            return await asyncio.gather(*map(one, images))

        alone, together = asyncio.run(run(1)), asyncio.run(run(24))
        different = sum(a != b for a, b in zip(alone, together, strict=True))
        return Verdict(
            f"{different} of {count} captions differ between one at a time and 24 clients",
            not different and None not in alone,
        )


def small_ones(long: bool) -> Verdict:
    """Signals, killed decoders, odd heads, half-closed connections, endless warnings."""
    found: dict[str, bool] = {}
    with service() as it:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            it.process.send_signal(number)
        time.sleep(0.3)
        found["SIGUSR1 is nothing"] = asyncio.run(one_caption(it)).caption == said()
        found["a Content-Length of 5,000 digits"] = _raw(
            it.port, b"Content-Length: " + b"9" * 5000 + b"\r\n\r\nx"
        ) in (b"400", b"413")
        found["half-closed"] = _half_closed(it.port) == b"200"
        post(it.port, b"Content-Type: image/tiff", tags())
        found["65,535 tags"] = len(it.log()) < 20_000
        found["decoders killed"] = _decoders_killed(it)
        with ThreadPoolExecutor(12) as pool:
            futures = [pool.submit(lambda: asyncio.run(one_caption(it))) for _ in range(12)]
            wait_for(lambda: it.metric("vignette_requests_inside") > 0, 10, it.log)
            it.process.send_signal(signal.SIGQUIT)
            statuses = {f.result().status for f in futures}
        found["SIGQUIT drains"] = statuses <= {200, 503, 0} and it.process.wait(30) == 0
    wrong = [name for name, good in found.items() if not good]
    return Verdict(
        f"{len(found) - len(wrong)} of {len(found)} as expected {wrong or ''}", not wrong
    )


def _decoders_killed(it: Service) -> bool:
    """Whether some decoders were killed in a 4-second closed loop, and every caption is right."""

    async def run() -> list[bool]:
        answers = await Clients(it.url).closed_loop(sample(), 4, after(4))
        return [a.caption == said() for a in answers]

    with ThreadPoolExecutor(1) as pool:
        load, kills = pool.submit(lambda: asyncio.run(run())), 0
        while not load.done():
            spawned = [p for p in family(it.process.pid) if "spawn_main" in command_line(p)]
            decoders = [p for p in spawned if family(p) == [p] and not runs_engine(p)]
            if decoders:
                # The oldest: the next one may have the image of the one before, for its last time.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(min(decoders), signal.SIGKILL)
                    kills += 1
            time.sleep(1)
        return kills > 0 and all(load.result())


def _raw(port: int, rest: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST /caption HTTP/1.1\r\nHost: x\r\n" + rest)
        return client.recv(4096).split()[1]


def _half_closed(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        head = f"Host: x\r\nConnection: close\r\nContent-Length: {len(sample())}\r\n\r\n"
        client.sendall(b"POST /caption HTTP/1.1\r\n" + head.encode() + sample())
        client.shutdown(socket.SHUT_WR)
        return client.recv(4096).split()[1]
