"""Simulated hosts of a cluster, and a request's way through one.

The engine is the real one, with its scheduler and pacing, on the simulation's clock
(`bench.load.replay`); its calls take the measured time, longer while other processes use the cores.
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
from runtime.model import manifest as manifests
from runtime.observer import Observer, StepReport
from runtime.planning.config import EngineConfig

# The system's scheduler gives niceness 0 three times the CPU time of niceness 5.
FIRST, AFTER = 1024 / 335, 1.0
Steps = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of host.

    engine: seconds of its calls. front_s, decode_s: core seconds per request, in front-ends and
    image decoders. on_cores: whether the engine needs all cores, too. bits: network bandwidth, per
    second. dollars: per hour. image_bytes: per request.
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
        """Slots of the engine."""
        return len(self.engine.decode_s)


class _Work(Observer):
    """seconds: time that an engine's steps would have taken in full batches."""

    def __init__(self, costs: Costs) -> None:
        self.seconds = 0.0
        self._image_s = costs.encode_s[-1] / len(costs.encode_s)
        self._row_s = costs.decode_s[-1] / len(costs.decode_s)

    def stepped(self, report: StepReport) -> None:
        self.seconds += report.encoded * self._image_s + report.rows * self._row_s


class Host:
    """A host of some kind with its own engine."""

    def __init__(self, env: simpy.Environment, kind: Kind, folder: Path) -> None:
        """folder: engine folder, for the model's sizes."""
        self._env, self._kind = env, kind
        self._cores = Cores(env, kind.cores)
        self._decoders = simpy.Resource(env, kind.cores)
        self._network = simpy.Resource(env, 1)
        manifest = manifests.read(folder)
        self._engine, self._clock = replayed(folder, manifest, kind.engine, EngineConfig())
        self._work = self._engine.observer = _Work(kind.engine)
        self._pixels = np.zeros(manifest.sizes.pixels, np.uint8)
        self._waiting: dict[int, simpy.Event] = {}
        self._came = env.event()
        self.inside = 0
        self._busy = {"JPEG decoding": 0.0, "front-ends": 0.0, "network": 0.0}
        env.process(self._step())

    def caption(self, tokens: int) -> Steps:
        """Simulate a request from its first byte to its answer."""
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
        """Busy seconds of each part. The engine's are those of full batches: one that always runs
        with few rows is busy, but not the bottleneck.
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
    """Hosts of one kind behind a load balancer, which picks the less loaded of two random ones."""

    def __init__(self, kind: Kind, count: int, folder: Path) -> None:
        self.env, self._kind = simpy.Environment(), kind
        self.hosts = [Host(self.env, kind, folder) for _ in range(count)]
        self._rng = random.Random(2)
        self.seconds: list[float] = []  # latency of each answered request

    def closed_loop(self, clients: int, lengths: Sequence[int]) -> None:
        """Run clients that ask for captions of `lengths` tokens, each again when answered."""
        coming = iter(lengths)

        def client() -> Steps:
            for tokens in coming:
                yield from self._ask(tokens)

        self.env.run(self.env.all_of([self.env.process(client()) for _ in range(clients)]))

    def poisson(self, rate: float, lengths: Sequence[int]) -> None:
        """Run Poisson arrivals at `rate` requests per second, whether answered or not."""

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
        """Captions per second, from the start of the simulation to the last answer."""
        return len(self.seconds) / self.env.now

    def used(self) -> dict[str, float]:
        """Utilisation of each part, 1 being all of its capacity (see `Host.busy`)."""
        cores = self._kind.cores
        width = {"engine": 1, "JPEG decoding": cores, "front-ends": cores, "network": 1}
        whole = self.env.now * len(self.hosts)
        return {
            part: sum(host.busy[part] for host in self.hosts) / whole / width[part]
            for part in width
        }
