"""Scenarios: overload, a full queue, an expired deadline."""

import asyncio
import os
import signal
import time

from bench.common.arithmetic import percentile
from bench.reliability.load import Answer, Clients, after, counts
from bench.reliability.running import DEMO, LARGE, Verdict, sample, service


def overload(long: bool) -> Verdict:
    """Open loop at twice the capacity."""
    # Captions have to cost more than the clients, which run on the same cores.
    engine = LARGE if long else DEMO
    seconds, measured_s = (600, 30) if long else (8, 3)
    image = sample()
    flags = ("--timeout-seconds", "10", "--max-queue", "64", "--precision")
    with service(*flags, "auto" if long else "fp32/fp32/float32", engine=engine) as it:

        async def run() -> tuple[float, int, list[Answer]]:
            clients = Clients(it.url)
            await clients.closed_loop(image, 80, after(2))
            measured = await clients.closed_loop(image, 16, after(measured_s))
            peak, before = len(measured) / measured_s, it.resident()
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
        return Verdict(figure, good and grown < 32, in_time, engine)


def full_queue(long: bool) -> Verdict:
    """A queue of N; N + k requests sent behind a stopped worker."""
    queue, extra = 8, 5
    flags = ("--slots", "1", "--max-queue", str(queue), "--front-ends", "1")
    with service(*flags) as it:
        os.kill(it.worker_pid(), signal.SIGSTOP)

        async def run() -> list[Answer]:
            clients = Clients(it.url)
            return await asyncio.gather(
                *(clients.caption(sample()) for _ in range(1 + queue + extra))
            )

        answers = asyncio.run(run())
        found = counts(answers)
        counted = it.metric("vignette_requests_total", outcome="queue_full")
        return Verdict(
            f"{found.get(429, 0)} of {1 + queue + extra} refused, counter {counted:.0f}, "
            f"{found.get(200, 0)} captioned",
            found == {200: 1 + queue, 429: extra} and counted == extra,
        )


def deadline_in_the_queue(long: bool) -> Verdict:
    """The deadline passes in the queue.

    It is long enough for four captions one after the other: else the last are refused at once.
    """
    deadline_ms = 2000  # a stopped worker is replaced after 3 s
    with service("--slots", "1") as it:
        encoded = it.metric("vignette_encode_batch_images_sum")
        os.kill(it.worker_pid(), signal.SIGSTOP)

        async def run() -> list[Answer]:
            clients = Clients(it.url)
            return await asyncio.gather(
                *(clients.caption(sample(), f"?timeout_ms={deadline_ms}") for _ in range(4))
            )

        answers = asyncio.run(run())
        it.wait_ready()
        time.sleep(0.5)
        executed = it.metric("vignette_encode_batch_images_sum") - encoded
        found = counts(answers)
        others = {status: number for status, number in found.items() if status != 504}
        return Verdict(
            f"{found.get(504, 0)} of 4 answered 504, {executed:.0f} executed"
            + (f"; other answers: {others}" if others else ""),
            found == {504: 4} and executed == 0,
        )
