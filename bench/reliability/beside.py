"""Scenarios: attacks beside honest clients, whose throughput and captions must hold."""

import asyncio
import io
import os
import statistics
import time
from dataclasses import dataclass

from PIL import Image

from bench.common.arithmetic import percentile
from bench.reliability.attacks import ATTACKS, PROXY
from bench.reliability.load import Answer, Clients, after
from bench.reliability.running import Service, Verdict, said, sample, service
from bench.reliability.senders import assault

_HONEST = 8
_GROWN = 1200  # MiB of all processes: one image of 50 Mpx being decoded, and bodies being received

_PERIOD, _ATTACKED = 10, 5  # seconds; attacked periods per quiet one (interleaved: machines vary)
_MISSING = 1e-4  # share of requests that may go without a caption
_SETTLING_SECONDS = 30
_EQUAL = 0.3  # share of its rate that a client keeps beside another, with the first long turn
_KEPT = 400  # MiB that decoders, the one for expensive images included, keep for reuse


@dataclass(frozen=True, slots=True)
class Period:
    """What honest clients measured in one period: captions per second, p99 latency in seconds."""

    rate: float
    p99: float
    wrong: int  # captions that are not the image's
    missing: int  # answers without a caption: refused, or cut off


def _honest(it: Service, seconds: float) -> Period:
    async def run() -> list[Answer]:
        return await Clients(it.url).closed_loop(sample(), _HONEST, after(seconds))

    answers = asyncio.run(run())
    missing = sum(a.caption is None for a in answers)
    wrong = sum(a.caption != said() for a in answers) - missing
    p99 = percentile([a.seconds for a in answers], 0.99)
    return Period(len(answers) / seconds, p99, wrong, missing)


def _replaced(it: Service) -> int:
    """Processes other than decoders that were killed and restarted."""
    return sum("it is replaced" in line for line in it.log().splitlines())


def _settled(it: Service, before: int) -> int:
    """Memory growth in bytes after the last expensive image, which may take a while to decode."""
    end = time.monotonic() + _SETTLING_SECONDS
    while (kept := it.resident() - before) > _KEPT * 2**20 and time.monotonic() < end:
        time.sleep(0.5)
    return kept


def beside(names: list[str], senders: tuple[int, ...], seconds: float) -> Verdict:
    """Run the named attacks, from each number of senders, beside honest clients."""
    with service("--precision", "fp32/fp32/float32", "--trusted-proxies", PROXY) as it:
        _honest(it, 2)
        quiet, during, peak = [_honest(it, min(30, seconds))], [], 0
        before = it.resident()
        for count in senders:
            with assault(names, it.port, count) as still:
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    for _ in range(_ATTACKED):
                        during.append(_honest(it, min(_PERIOD, seconds / _ATTACKED)))
                        peak = max(peak, it.resident() - before)
                    with still():
                        quiet.append(_honest(it, min(_PERIOD, seconds / _ATTACKED)))
        replaced, grown = _replaced(it), peak / 2**20
        rate, usual = (statistics.median(p.rate for p in some) for some in (during, quiet))
        p99, usual_p99 = (statistics.median(p.p99 for p in some) for some in (during, quiet))
        wrong, missing = (
            sum(getattr(p, kind) for p in (*during, *quiet)) for kind in ("wrong", "missing")
        )
        asked = (rate * len(during) + usual * len(quiet)) * min(_PERIOD, seconds / _ATTACKED)
        _honest(it, min(5, seconds))
        kept = _settled(it, before) / 2**20
        return Verdict(
            f"{'/'.join(map(str, senders))} senders for {seconds / 60:.1f} minutes each: honest "
            f"{rate / usual:.0%} of {usual:.1f}/s, p99 {p99:.2f} s instead of "
            f"{usual_p99:.2f}, {wrong} wrong, {missing} not captioned; "
            f"{replaced} processes replaced, {grown:+.0f} MiB during, {kept:+.0f} after",
            not wrong
            and missing <= _MISSING * asked
            and not replaced
            and grown < _GROWN
            and kept < _KEPT,
            rate >= 0.5 * usual and p99 <= 4 * usual_p99,
        )


def _short(names: list[str], long: bool) -> Verdict:
    return beside(names, (1, 8, 32) if long else (4,), 30 if long else 3)


def content_types(long: bool) -> Verdict:
    """Heads, boundaries and forms that are slow to parse, pages by the dozen and by the hundred at
    once, requests sent ahead by the thousand, bodies in single bytes.
    """
    names = ["boundary", "parameters", "form", "tiny chunks", "accept", "slow heads", "pages"]
    names += ["bursts", "ahead", "queries", "trickled", "dripped", "dripped through a proxy"]
    names += ["heads"]
    return _short(names, long)


def large_json(long: bool) -> Verdict:
    """JSON of a million keys, of 1.6 million strings, of escapes alone."""
    return _short(["keys", "strings", "escapes"], long)


def unread_answers(long: bool) -> Verdict:
    """A field name of ten megabytes; answers that clients don't read, or leave before; more
    captions than the queue takes.
    """
    return _short(["unread", "left", "resets", "crowd"], long)


def expensive_images(long: bool) -> Verdict:
    """Images of a few bytes that take seconds and a gigabyte to decode."""
    return _short(["700 scans", "90 scans", "unpacking", "tags", "strips", "clips"], long)


def large_photographs(long: bool) -> Verdict:
    """Photographs of one client, one after the other, beside another's clips of seconds, and
    beside its images that look as large: all wait for one process.
    """
    seconds = 30 if long else 10
    with service() as it:
        usual, failed = _photographs(it, seconds)
        rates = {}
        for name in ("slow clips", "broken giants"):
            with assault([name], it.port, 4 if name == "slow clips" else 1):
                rates[name], missing = _photographs(it, 2 * seconds)
            failed += missing
    told = ", ".join(f"{rate / usual:.0%} beside {name}" for name, rate in rates.items())
    return Verdict(
        f"{usual:.1f} photographs of 23 megapixels a second: {told}; {failed} not captioned",
        not failed,
        min(rates.values()) >= _EQUAL * usual,
    )


def _photographs(it: Service, seconds: float) -> tuple[float, int]:
    """Photographs a second of a client that sends one after the other; those not captioned."""
    noise = Image.effect_noise((5600, 4200), 40).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=70, progressive=True)

    async def run() -> list[Answer]:
        clients, until, answers = Clients(it.url), after(seconds), list[Answer]()
        while not until():
            answers.append(await clients.caption(buffer.getvalue() + os.urandom(8)))
        return answers

    answers = asyncio.run(run())
    return len(answers) / seconds, sum(a.caption is None for a in answers)


def siege(long: bool, minutes: float = 120) -> Verdict:
    """All attacks together, from 1, 8 and 32 senders, for two hours."""
    senders = (1, 8, 32) if long else (8,)
    return beside(list(ATTACKS), senders, 60 * minutes / len(senders) if long else 3)
