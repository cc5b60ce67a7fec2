"""Simulated cores of a host, shared by weight as the system's scheduler does."""

from dataclasses import dataclass, field

import simpy


@dataclass(slots=True, eq=False)
class _Job:
    """left: seconds remaining with a core for each thread. weight: of each of its threads."""

    left: float
    threads: int
    weight: float
    done: simpy.Event
    speed: float = field(default=0.0)


class Cores:
    """Runs jobs whose threads are always runnable.

    busy: core seconds worked so far.
    """

    def __init__(self, env: simpy.Environment, count: int) -> None:
        self._env, self._count = env, count
        self._jobs: list[_Job] = []
        self._since = env.now
        self._version = 0
        self.busy = 0.0

    def run(self, seconds: float, weight: float = 1.0, threads: int = 1) -> simpy.Event:
        """Start a job that takes `seconds` with a core for each thread; the event marks its end."""
        job = _Job(seconds, threads, weight, self._env.event())
        self._settle()
        self._jobs.append(job)
        self._plan()
        return job.done

    def _settle(self) -> None:
        """Account for the work done since the last change."""
        passed = self._env.now - self._since
        self._since = self._env.now
        for job in self._jobs:
            job.left -= passed * job.speed
            self.busy += passed * job.speed * job.threads

    def _plan(self) -> None:
        """Share the cores, and wake when the first job ends."""
        self._share()
        self._version += 1
        if self._jobs:
            first = min(max(0.0, job.left) / job.speed for job in self._jobs)
            self._env.process(self._wait(first, self._version))

    def _share(self) -> None:
        """Share by weight; a thread gets at most one core, and the rest goes to the others."""
        cores, open_ = float(self._count), list(self._jobs)
        while open_:
            each = cores / sum(job.threads * job.weight for job in open_)
            full = [job for job in open_ if job.weight * each >= 1]
            for job in full or open_:
                job.speed = 1.0 if full else job.weight * each
                cores -= job.speed * job.threads
            open_ = [job for job in open_ if job not in full] if full else []

    def _wait(self, seconds: float, version: int):  # type: ignore[no-untyped-def]
        yield self._env.timeout(seconds)
        if version != self._version:
            return  # superseded: a job has begun or ended since
        self._settle()
        over = [job for job in self._jobs if job.left <= 1e-9]
        self._jobs = [job for job in self._jobs if job.left > 1e-9]
        for job in over:
            job.done.succeed()
        self._plan()
