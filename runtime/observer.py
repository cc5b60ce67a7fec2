"""What an engine tells of its steps, to metrics and benchmarks."""

from dataclasses import dataclass

from runtime.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class StepReport:
    """Counts of a step: images encoded, rows fed, sequences running and waiting after it."""

    encoded: int
    rows: int
    running: int
    waiting: int


class Observer:
    """Callbacks for an engine's steps, on the stepping thread; they must not use the engine."""

    def admitted(self, requests: list[GenerationRequest]) -> None:
        """`requests` are about to be encoded."""

    def stepped(self, report: StepReport) -> None:
        """A step has ended, or a request was cancelled."""
