"""Decode steps of all running sequences, from their start to what the sequences take from them."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace

from runtime.decoding.candidates import Move
from runtime.execution.base import ModelRunner, Pending
from runtime.model.manifest import UNFORCED
from runtime.request import FinishReason
from runtime.searching import Groups, grouped, search_of, steps_of
from runtime.sequence import Sequence

log = logging.getLogger(__name__)


def can_burst(running: Items[Sequence], runner: ModelRunner) -> bool:
    """Whether the runner chooses the tokens of all of them, and so may run several steps."""
    return all(_by_runner(sequence, runner.searches) for sequence in running)


def _by_runner(sequence: Sequence, searching: bool) -> bool:
    """searching: whether the runner searches for beams."""
    return sequence.decoding.can_burst and (searching or len(sequence.slots) == 1)


@dataclass(frozen=True, slots=True)
class Burst:
    """Decode steps on their way, of the sequences `running` in so many `rows`.

    at: when they were begun. bursting: whether the runner chooses the tokens, of the groups in
    `searched` by beams. most_fed: most text tokens that any cache held before.
    """

    pending: Pending
    at: float
    bursting: bool
    searched: Groups
    most_fed: int
    running: Items[Sequence]
    rows: int
    steps: int

    @classmethod
    def start(
        cls,
        runner: ModelRunner,
        running: Items[Sequence],
        rows: int,
        bursting: bool,
        vocabulary: int,
        now: float,
    ) -> "Burst":
        """Feed every running row; `rows` leading ones hold them all. bursting: see `can_burst`."""
        steps = _steps(runner, running) if bursting else 1
        candidates = 1 if bursting else _candidates(running, vocabulary)
        tokens, fed = [[0] * rows, *([UNFORCED] * rows for _ in range(1, steps))], [0] * rows
        for sequence in running:
            for slot in sequence.slots:
                fed[slot] = sequence.fed
            for step, fed_next in enumerate(sequence.tokens(steps)):
                for slot, token in zip(sequence.slots, fed_next, strict=True):
                    tokens[step][slot] = token
        searched = grouped(running) if bursting else ()
        searches = [search_of(group) for group in searched]
        pending = runner.decode(tokens[0], fed, tokens[1:], candidates, searches)
        return cls(pending, now, bursting, searched, max(fed), running, rows, steps)

    @property
    def slots(self) -> int:
        """Slots of the sequences now; those that have ended have none."""
        return sum(len(sequence.slots) for sequence in self.running)

    def proceed(self, runner: ModelRunner, running: Items[Sequence], now: float) -> "Burst | None":
        """Begin the steps that follow, before the results are known: of sequences that will have
        ended by then, the further tokens are dropped.

        running: the sequences that run now. None if the host must work on the results first, for
        new sequences, a smaller bucket, or a prompt.
        """
        left = sorted(n for s in running if (n := s.max_burst - self.steps) > 0)
        if (
            not (self.bursting and left)
            or not {*running} <= {*self.running}
            or any(s.prompted >= self.steps for s in running)
            or runner.bucket(sum(len(s.slots) for s in running)) < runner.bucket(self.rows)
        ):
            return None
        most_fed = self.most_fed + self.steps
        steps = min(runner.burst, runner.text_tokens - most_fed, _lasting(left))
        if steps < 1:
            return None
        return replace(self, pending=runner.proceed(steps), at=now, most_fed=most_fed, steps=steps)

    def finish(self, runner: ModelRunner, ended: Callable[[], object]) -> None:
        """Wait for the results, and have the sequences take them that have not ended meanwhile.

        ended: called in between.
        """
        found = self.pending.wait()
        ended()
        likeliest, moves = found.likeliest(), list[Move]()
        candidates = [] if self.bursting else found.rows()
        searched = steps_of(self.searched, found)
        for sequence in self.running:
            if sequence.finish_reason is not None:
                continue
            try:
                if _by_runner(sequence, self.bursting):
                    sequence.extend(
                        [likeliest[slot] for slot in sequence.slots],
                        searched.get(sequence.request.id, ()),
                    )
                else:
                    moves += sequence.advance([candidates[slot] for slot in sequence.slots])
            except Exception:  # an internal error ends that sequence only
                log.exception("request %d failed as its tokens were chosen", sequence.request.id)
                sequence.finish_reason = FinishReason.ERROR
        if moves:
            runner.reorder(moves, self.most_fed + 1)


def _steps(runner: ModelRunner, running: Items[Sequence]) -> int:
    """Decode steps without host input, for which all sequences have cache positions."""
    if runner.burst == 1:
        return 1
    room = runner.text_tokens - max(s.fed for s in running)
    return min(runner.burst, room, _lasting(sorted(s.max_burst for s in running)))


def _lasting(left: Items[int]) -> int:
    """Steps that three quarters of the sequences can use, lest a step works for few."""
    return left[len(left) // 4]


def _candidates(running: Items[Sequence], vocabulary: int) -> int:
    """Candidates per row: a power of two, so that few distinct values occur."""
    wanted = max(sequence.candidates for sequence in running)
    return min(1 << (wanted - 1).bit_length(), vocabulary)
