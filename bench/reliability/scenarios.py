"""All scenarios by name, in the order of the table, and how to try some of them."""

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


@dataclass(frozen=True, slots=True)
class Scenario:
    """A promise to try.

    run: takes whether to try it in its long form. alone: whether nothing else may run beside it,
    because it is judged by rates, or by memory, of which servers share some.
    """

    title: str
    run: Callable[..., Verdict]
    alone: bool = False

    @property
    def name(self) -> str:
        """The function's, as a word of the command line."""
        return self.run.__name__.replace("_", "-")


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("twice the capacity, open loop", admission.overload, alone=True),
        Scenario("a full queue", admission.full_queue),
        Scenario("a deadline in the queue", admission.deadline_in_the_queue),
        Scenario("clients that leave", clients.disconnects),
        Scenario("clients that reset together", clients.resets),
        Scenario("SIGKILL of the worker under load", processes.kills),
        Scenario("SIGSTOP of the worker", processes.stopped_worker),
        Scenario("an engine that fails on one image", processes.faults),
        Scenario("SIGTERM under load, and a second", processes.sigterm),
        Scenario("slow heads and bodies", clients.slow_clients),
        Scenario("oversized bodies", clients.oversized, alone=True),
        Scenario("bombs, mutants, odd images", images.broken_images),
        Scenario("image_url tricks", urls.url_tricks),
        Scenario("starts that can't succeed", processes.bad_starts),
        Scenario("schemathesis", endurance.fuzzing, alone=True),
        Scenario("mixed load for an hour", endurance.soak, alone=True),
        Scenario(
            "Content-Types and forms that take long to read", beside.content_types, alone=True
        ),
        Scenario("JSON that takes long to read", beside.large_json, alone=True),
        Scenario("answers that nobody reads", beside.unread_answers, alone=True),
        Scenario("images that take long to decode", beside.expensive_images, alone=True),
        Scenario("idle connections", surroundings.idle_connections),
        Scenario("a second instance in another container", surroundings.second_instance),
        Scenario("a worker that somebody kills", surroundings.killed_while_asked),
        Scenario("two servers on one port", surroundings.same_port),
        Scenario("a log that nobody reads", surroundings.unread_log),
        Scenario("shared memory that is full", surroundings.full_memory),
        Scenario("settings without room for them", surroundings.wild_settings),
        Scenario("ambiguous images among others", surroundings.neighbours),
        Scenario("signals, heads, decoders", surroundings.small_ones),
        Scenario("all attacks for two hours", beside.siege, alone=True),
        Scenario("a worker killed under streams and gRPC", protocols.killed_under_streams),
        Scenario("replicas and nodes of a cluster that die", cluster.dying_cluster),
        Scenario("gRPC calls that are held, wrong or left", calls.held_calls, alone=True),
        Scenario("large photographs beside slow clips", beside.large_photographs, alone=True),
    )
}

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
        siege = {"minutes": minutes} if SCENARIOS[name].run is beside.siege else {}
        yield _tried(name, True, **siege)


def try_short(names: list[str]) -> Iterator[Trial]:
    """Try scenarios in their short form, which mostly wait: some at once, as they end."""
    together = [name for name in names if not SCENARIOS[name].alone]
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
        verdict = SCENARIOS[name].run(long, **siege)
    except Exception as error:  # any exception: the other scenarios are still worth running
        traceback.print_exc()
        verdict = Verdict(f"{type(error).__name__}: {error}", False)
    return Trial(name, verdict, time.perf_counter() - started)
