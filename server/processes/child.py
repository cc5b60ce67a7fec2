"""A process that the supervisor keeps alive: its state and its health."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Literal

from server.ipc.messages import (
    End,
    ProcessKind,
    WorkerCondition,
    WorkerFacts,
    WorkerState,
    process_name,
)
from server.system import KILLED_FROM_OUTSIDE, environment

_SILENCE_SECONDS = 3.0  # without a heartbeat: the process is stopped, or starved
# Likewise during start-up, on a processor and on a GPU: loading a graph, or compiling it, may hold
# the GIL for long.
_STARTING_SECONDS = 600.0, 7200.0
_SLOWER = 4  # times that a step may be slower than the self-test, which had the cores to itself
Problem = Literal["ended", "hung", "stuck"]
_FAILING = 2  # starts in a row that failed
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(slots=True)
class Child:
    """A process, restarted as needed. `epoch` counts its starts; times are `time.monotonic()`.

    main: entry point, called with index and epoch. model: the one that a worker serves.
    environment: variables for this process only.
    """

    kind: ProcessKind
    index: int
    main: Callable[[int, int], None]
    model: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    epoch: int = 0
    process: BaseProcess | None = None
    state: Literal["starting", "ready", "down", "over"] = "starting"
    serves: bool = False  # of a front-end: it has heard that all models serve
    heard_at: float = 0.0
    step_since: float | None = None
    start_at: float = 0.0
    failures: int = 0
    last_end: End | None = None
    facts: WorkerFacts | None = None  # of a worker that was ready once

    def start(self) -> None:
        """Start the process in its next epoch."""
        self.epoch += 1
        self.state, self.serves, self.step_since = "starting", False, None
        self.heard_at = time.monotonic()
        process = _CONTEXT.Process(target=self.main, args=(self.index, self.epoch), name=self.name)
        with environment(self.environment):
            process.start()
        self.process = process

    def note_end(self, reason: Problem) -> None:
        """Set `last_end`."""
        killed = self.process is not None and self.process.exitcode in KILLED_FROM_OUTSIDE
        self.last_end = reason if reason != "ended" else "killed" if killed else "crashed"

    def kill(self) -> None:
        """Kill the process, if it was started."""
        if self.process is not None:
            self.process.kill()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.is_alive()

    def health_problem(self, now: float, step_seconds: float) -> Problem | None:
        """Why the process must be replaced, or None. step_seconds: longest step, unless the engine
        was measured to take longer for as many images as a step encodes.
        """
        if not self.alive:
            return "ended"
        on_gpu = "CUDA_VISIBLE_DEVICES" in self.environment
        silence = _STARTING_SECONDS[on_gpu] if self.state == "starting" else _SILENCE_SECONDS
        if now - self.heard_at > silence:
            return "hung"
        since = now if self.step_since is None else self.step_since
        if self.facts is not None and self.facts.self_test_seconds is not None:
            expected = self.facts.self_test_seconds * self.facts.encode_batch
            step_seconds = max(step_seconds, _SLOWER * expected)
        return "stuck" if now - since > step_seconds else None

    @property
    def stable_name(self) -> str:
        """Name without the epoch: stable across restarts."""
        return f"{self.kind}-{self.index}"

    @property
    def name(self) -> str:
        """Name with the current epoch."""
        return process_name(self.kind, self.index, self.epoch)

    def worker_state(self) -> WorkerState:
        """State as told to front-ends and /health/ready."""
        pid = self.process.pid if self.process else None
        restarts = self.epoch - 1
        return WorkerState(
            model=self.model,
            device=self.environment.get("CUDA_VISIBLE_DEVICES", "cpu"),
            index=self.index,
            epoch=self.epoch,
            state=self._told,
            pid=pid,
            restarts=restarts,
            last_end=self.last_end,
            facts=self.facts,
        )

    @property
    def _told(self) -> WorkerCondition:
        if self.state == "ready":
            return "ready"
        if self.failures >= _FAILING and self.facts is not None:
            return "failing"
        return "starting" if self.epoch <= 1 and self.state == "starting" else "recovering"
