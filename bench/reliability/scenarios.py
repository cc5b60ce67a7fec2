"""All scenarios by their names in the table, and how to try some of them."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from bench.reliability import (
    admission,
    beside,
    calls,
    clients,
    cluster,
    endurance,
    images,
    processes,
    protocols,
    surroundings,
    urls,
)
from bench.reliability.running import Verdict

SCENARIOS: dict[str, tuple[int, Callable[..., Verdict]]] = {
    "twice the capacity, open loop": (1, admission.overload),
    "a full queue": (2, admission.full_queue),
    "a deadline in the queue": (3, admission.deadline_in_the_queue),
    "clients that leave": (4, clients.disconnects),
    "clients that reset together": (5, clients.resets),
    "SIGKILL of the worker under load": (6, processes.kills),
    "SIGSTOP of the worker": (7, processes.stopped_worker),
    "an engine that fails on one image": (8, processes.faults),
    "SIGTERM under load, and a second": (9, processes.sigterm),
    "slow heads and bodies": (10, clients.slow_clients),
    "oversized bodies": (11, clients.oversized),
    "bombs, mutants, odd images": (12, images.broken_images),
    "image_url tricks": (13, urls.url_tricks),
    "starts that can't succeed": (14, processes.bad_starts),
    "schemathesis": (15, endurance.fuzzing),
    "mixed load for an hour": (16, endurance.soak),
    "Content-Types and forms that take long to read": (17, beside.content_types),
    "JSON that takes long to read": (18, beside.large_json),
    "answers that nobody reads": (19, beside.unread_answers),
    "images that take long to decode": (20, beside.expensive_images),
    "idle connections": (21, surroundings.idle_connections),
    "a second instance in another container": (22, surroundings.second_instance),
    "a worker that somebody kills": (23, surroundings.killed_while_asked),
    "two servers on one port": (24, surroundings.same_port),
    "a log that nobody reads": (25, surroundings.unread_log),
    "shared memory that is full": (26, surroundings.full_memory),
    "settings without room for them": (27, surroundings.wild_settings),
    "ambiguous images among others": (28, surroundings.neighbours),
    "signals, heads, decoders": (29, surroundings.small_ones),
    "all attacks for two hours": (30, beside.siege),
    "a worker killed under streams and gRPC": (31, protocols.killed_under_streams),
    "replicas and nodes of a cluster that die": (32, cluster.dying_cluster),
    "gRPC calls that are held, wrong or left": (33, calls.held_calls),
    "large photographs beside slow clips": (34, beside.large_photographs),
}

# Judged by rates, or by memory, of which servers share some: nothing else may run beside them.
_ALONE = frozenset({1, 11, 15, 16, 17, 18, 19, 20, 30, 33, 34})
_AT_ONCE = 2  # scenarios in short form


@dataclass(frozen=True, slots=True)
class Trial:
    """A scenario that was tried, and the seconds it took."""

    name: str
    verdict: Verdict
    seconds: float


def try_long(names: list[str], minutes: float) -> Iterator[Trial]:
    """Try scenarios in their long form, one after the other. minutes: of the siege."""
    for name in names:
        siege = {"minutes": minutes} if SCENARIOS[name][1] is beside.siege else {}
        yield _tried(name, True, **siege)


def try_short(names: list[str]) -> Iterator[Trial]:
    """Try scenarios in their short form, which mostly wait: some at once, as they end."""
    together = [name for name in names if SCENARIOS[name][0] not in _ALONE]
    with ProcessPoolExecutor(_AT_ONCE, multiprocessing.get_context("spawn")) as pool:
        trials = {pool.submit(_tried, name, False): name for name in together}
        for trial in as_completed(trials):
            try:
                yield trial.result()
            except BrokenProcessPool as error:  # the system killed one, for its memory perhaps
                yield Trial(trials[trial], Verdict(repr(error), False), 0.0)
    for name in names:
        if name not in together:
            yield _tried(name, False)


def _tried(name: str, long: bool, **siege: float) -> Trial:
    started = time.perf_counter()
    try:
        verdict = SCENARIOS[name][1](long, **siege)
    except Exception as error:  # any exception: the other scenarios are still worth running
        traceback.print_exc()
        verdict = Verdict(f"{type(error).__name__}: {error}", False)
    return Trial(name, verdict, time.perf_counter() - started)
