"""Hosts of a cluster, and what happens to a request on the way through one.

The engine is the real one, with its scheduler and pacing, on the clock of the simulation
(`bench.load.replay`); its calls take what was measured, and longer while others use the cores.
"""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from bench.load.costs import Costs
from bench.load.replay import replayed
from bench.scaling.cores import Cores
from runtime.engine import Observer, StepReport
from runtime.model import manifest as manifests
from runtime.planning.config import EngineConfig

# The system's scheduler gives a process of niceness 0 three times what it gives one of 5.
FIRST, AFTER = 1024 / 335, 1.0
Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of host.

    engine: seconds of its calls. front_s, decode_s: of a core, for each request. on_cores: whether
    the engine needs all cores, too. bits: a second that its network takes. dollars: an hour.
    image_bytes: of a request.
    """

    name: str
    cores: int
    engine: Costs
    front_s: float
    decode_s: float
    on_cores: bool
    dollars: float
    bits: float = 10e9
    image_bytes: int = 100_000

    @property
    def slots(self) -> int:
        """Slots of its engine."""
        return len(self.engine.decode_s)


class _Work(Observer):
    """seconds: that the steps of an engine would have taken in full calls."""

    def __init__(self, costs: Costs) -> None:
        self.seconds = 0.0
        self._image_s = costs.encode_s[-1] / len(costs.encode_s)
        self._row_s = costs.decode_s[-1] / len(costs.decode_s)

    def stepped(self, report: StepReport) -> None:
        self.seconds += report.encoded * self._image_s + report.rows * self._row_s


class Host:
    """One of a kind, with an engine of its own."""

    def __init__(self, env: simpy.Environment, kind: Kind, folder: Path) -> None:
        """folder: of an engine, for its sizes."""
        self._env, self._kind = env, kind
        self._cores = Cores(env, kind.cores)
        self._decoders = simpy.Resource(env, kind.cores)
        self._network = simpy.Resource(env, 1)
        config = EngineConfig(slots=kind.slots, encode_batch=len(kind.engine.encode_s))
        manifest = manifests.read(folder)
        self._engine, self._clock = replayed(folder, manifest, kind.engine, config)
        self._work = self._engine.observer = _Work(kind.engine)
        self._pixels = np.zeros(manifest.sizes.pixels, np.uint8)
        self._waiting: dict[int, simpy.Event] = {}
        self._came = env.event()
        self.inside = 0
        self._busy = {"JPEG decoding": 0.0, "front-ends": 0.0, "network": 0.0}
        env.process(self._step())

    def caption(self, tokens: int) -> Steps:
        """A request, from its first byte to its answer."""
        kind = self._kind
        self.inside += 1
        with self._network.request() as turn:
            yield turn
            yield self._env.timeout(self._spend("network", kind.image_bytes * 8 / kind.bits))
        yield self._cores.run(self._spend("front-ends", kind.front_s), FIRST)
        with self._decoders.request() as turn:
            yield turn
            yield self._cores.run(self._spend("JPEG decoding", kind.decode_s), AFTER)
        yield self._generate(tokens)
        self.inside -= 1

    @property
    def busy(self) -> dict[str, float]:
        """Seconds that each part worked; of the engine, what full calls would have taken: one that
        runs with few rows all the time is not what others wait for.
        """
        return {"engine": self._work.seconds} | self._busy

    def _spend(self, part: str, seconds: float) -> float:
        self._busy[part] += seconds
        return seconds

    def _generate(self, tokens: int) -> simpy.Event:
        self._clock.now = max(self._clock.now, self._env.now)
        request = self._engine.request(self._pixels, max_new_tokens=tokens, ignore_eos=True)
        self._engine.submit(request)
        done = self._waiting[request.id] = self._env.event()
        if not self._came.triggered:
            self._came.succeed()
        return done

    def _step(self) -> Steps:
        kind = self._kind
        while True:
            if self._engine.idle:
                self._came = self._env.event()
                yield self._came
            self._clock.now = began = self._env.now
            outputs = self._engine.step()
            seconds = self._clock.now - began
            if kind.on_cores:
                yield self._cores.run(seconds, AFTER, kind.cores)
            else:
                yield self._env.timeout(seconds)
            for output in outputs:
                if output.finish_reason is not None:
                    self._waiting.pop(output.id).succeed()


class Cluster:
    """Hosts of one kind behind a balancer, which takes the less busy of two drawn by lot."""

    def __init__(self, kind: Kind, count: int, folder: Path) -> None:
        self.env, self._kind = simpy.Environment(), kind
        self.hosts = [Host(self.env, kind, folder) for _ in range(count)]
        self._rng = random.Random(2)
        self.seconds: list[float] = []  # of each request that was answered

    def closed_loop(self, clients: int, lengths: Sequence[int]) -> None:
        """So many clients ask for captions of these lengths, and again when answered."""
        coming = iter(lengths)

        def client() -> Steps:
            for tokens in coming:
                yield from self._ask(tokens)

        self.env.run(self.env.all_of([self.env.process(client()) for _ in range(clients)]))

    def poisson(self, rate: float, lengths: Sequence[int]) -> None:
        """Requests come at so many a second, whatever happens to them."""

        def arrivals() -> Steps:
            asked = []
            for tokens in lengths:
                yield self.env.timeout(self._rng.expovariate(rate))
                asked.append(self.env.process(self._ask(tokens)))
            yield self.env.all_of(asked)

        self.env.run(self.env.process(arrivals()))

    def _ask(self, tokens: int) -> Steps:
        began = self.env.now
        two = self._rng.sample(self.hosts, min(2, len(self.hosts)))
        yield from min(two, key=lambda host: host.inside).caption(tokens)
        self.seconds.append(self.env.now - began)

    @property
    def rate(self) -> float:
        """Captions a second, from the first request to the last answer."""
        return len(self.seconds) / self.env.now

    def used(self) -> dict[str, float]:
        """Share of the time that each part worked, of what it could (see `Host.busy`)."""
        cores = self._kind.cores
        width = {"engine": 1, "JPEG decoding": cores, "front-ends": cores, "network": 1}
        whole = self.env.now * len(self.hosts)
        return {
            part: sum(host.busy[part] for host in self.hosts) / whole / width[part]
            for part in width
        }
