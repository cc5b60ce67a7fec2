"""Scenarios: clients that leave, reset, dawdle or send too much."""

import asyncio
import contextlib
import socket
import statistics
import struct
import time

from bench.common.arithmetic import percentile
from bench.reliability.load import Clients, abandon, after, one_caption
from bench.reliability.running import Verdict, said, sample, service, wait_for


def disconnects(long: bool) -> Verdict:
    """Clients disconnect while queued and mid-decode; other clients' captions stay right."""
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
        left = it.metric("vignette_running_sequences") + it.metric("vignette_queue_length")
        return Verdict(f"{sum(right)} of {len(right)} others right, {left:.0f} slots still taken",
                       all(right) and left == 0)  # fmt: skip


def resets(long: bool) -> Verdict:
    """A thousand clients reset together, five times."""
    clients, rounds = (1000, 5) if long else (200, 3)
    with service() as it:
        for _ in range(rounds):
            open_ = []
            for _ in range(clients):
                client = abandon(it.port, sample())
                # Close with RST instead of FIN.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                open_.append(client)
            for client in open_:
                client.close()
        answer = asyncio.run(one_caption(it))
        return Verdict(
            f"after {rounds} x {clients} resets the next answers {answer.status} in "
            f"{answer.seconds * 1e3:.0f} ms",
            answer.caption == said(),
        )


def slow_clients(long: bool) -> Verdict:
    """Slow heads and slow bodies beside normal load."""
    each, rounds, seconds = (500, 3, 5.0) if long else (50, 1, 2.0)
    limit = str(seconds + 1)  # so that slow clients stay for the whole measurement
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
    """Bodies too large by Content-Length, in chunks, in a million chunks, compressed."""
    with service("--max-body-bytes", "100000") as it:
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        tiny = b"1\r\nx\r\n" * (1_000_000 if long else 200_000)
        kinds = (
            b"Content-Length: 90000000\r\n\r\n" + b"x" * 1000,
            b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8 + b"0\r\n\r\n",
            b"Content-Encoding: gzip\r\nContent-Length: 20\r\n\r\n\x1f\x8b" + b"x" * 18,
        )
        chunked = b"Transfer-Encoding: chunked\r\n\r\n" + tiny
        for kind in (*kinds * 30, chunked):
            _raw(it.port, kind)  # to warm up
        statuses = []
        before = it.resident()
        for _ in range(200 if long else 100):
            statuses += [_raw(it.port, kind) for kind in kinds]
        statuses.append(_raw(it.port, chunked))
        time.sleep(0.5)
        grown = (it.resident() - before) / 2**20 / (len(statuses) / 100)
        # The server may hang up on a body of one-byte chunks.
        fine = all(400 <= status < 500 for status in statuses[:-1]) and statuses[-1] in (0, 413)
        good = asyncio.run(one_caption(it)).caption == said()
        return Verdict(
            f"{len(statuses)} requests, answers {sorted(set(statuses))}; {grown:.2f} MiB grown "
            "per 100",
            fine and good and grown < 1,
        )


def _raw(port: int, rest: bytes) -> int:
    """Status of a hand-written request; 0 without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"POST /caption HTTP/1.1\r\nHost: x\r\n" + rest)
        try:
            answer = client.recv(65536)
        except OSError:
            return 0
    words = answer.split()
    return int(words[1]) if len(words) > 1 else 0
