"""Which sequences run, and in which slots. Handles no tensors.

Slots are equal pieces of the K/V arena. A decode step works on rows `0 .. rows - 1`, so running
sequences are kept at the low end: a new sequence takes the lowest free slots, and `compact` moves
the highest used slot into a hole if that lets the runner work on fewer rows.
"""

import heapq
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.request import FinishReason, GenerationRequest, Priority
from runtime.sequence import Sequence

if TYPE_CHECKING:  # imports NumPy
    from runtime.decoding.base import Decoding

_REFILL_DIVISOR = 4  # admission waits for at most a quarter of the slots to be free


class Scheduler:
    """Continuous batching over `slots` slots; static batching if `refill` is off."""

    def __init__(
        self,
        slots: int,
        encode_batch: int,
        refill: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._encode_batch = encode_batch
        self._refill = refill
        self._slots_worth_refilling = max(1, slots // _REFILL_DIVISOR)
        self._interactive: deque[Sequence] = deque()
        self._batch: deque[Sequence] = deque()
        self._slots: dict[int, Sequence] = {}  # those with a sequence
        self._running: set[Sequence] = set()
        self._free = list(range(slots))  # a heap: the lowest comes first

    @property
    def waiting(self) -> int:
        """Number of sequences without a slot."""
        return len(self._interactive) + len(self._batch)

    @property
    def running(self) -> list[Sequence]:
        """Sequences with slots, ordered by their lowest slot."""
        return sorted(self._running, key=_lowest_slot)

    @property
    def count(self) -> int:
        """Number of running sequences."""
        return len(self._running)

    @property
    def rows(self) -> int:
        """Leading rows that cover all running sequences."""
        return max(self._slots, default=-1) + 1

    @property
    def idle(self) -> bool:
        """Whether no sequence waits or runs."""
        return not self.waiting and not self._running

    def add(self, request: GenerationRequest, decoding: "Decoding") -> Sequence:
        """Queue a request behind the waiting ones of its priority."""
        before = request.scheduling.arrival_time
        sequence = Sequence(request, decoding, self._clock() if before is None else before)
        self._queue_of(sequence).append(sequence)
        return sequence

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        interactive = sequence.request.scheduling.priority is Priority.INTERACTIVE
        return self._interactive if interactive else self._batch

    def expire(self, now: float) -> list[Sequence]:
        """Remove and return waiting sequences whose deadline has passed; they are never run."""
        expired: list[Sequence] = []
        for waiting in (self._interactive, self._batch):
            deadlines = ((s, s.request.scheduling.deadline) for s in waiting)
            for sequence in [s for s, at in deadlines if at is not None and at < now]:
                waiting.remove(sequence)
                sequence.finish_reason = FinishReason.EXPIRED
                sequence.finished = now
                expired.append(sequence)
        return expired

    def admit(self) -> list[Sequence]:
        """Give slots to waiting sequences, to be encoded next: by priority, then in queue order.

        With refill, at most `encode_batch` at a time, so that running sequences wait for one
        encoder call at most; and while any run, none until enough slots are free for a worthwhile
        call: one image at a time leaves cores idle. Without refill, a whole batch once the last
        one has ended. A sequence that needs several slots gets all of them at once, and holds back
        the sequences behind it until then.
        """
        room = min(self.waiting, self._encode_batch, self._slots_worth_refilling)
        if self._slots and (not self._refill or len(self._free) < room):
            return []
        most = self._encode_batch if self._refill else len(self._free)
        admitted: list[Sequence] = []
        while self.waiting and len(admitted) < most:
            queue = self._interactive or self._batch
            sequence = queue[0]
            if sequence.request.sampling.rows > len(self._free):
                break
            queue.popleft()
            for _ in range(sequence.request.sampling.rows):
                slot = heapq.heappop(self._free)
                sequence.slots.append(slot)
                self._slots[slot] = sequence
            sequence.admitted = self._clock()
            self._running.add(sequence)
            admitted.append(sequence)
        return admitted

    def compact(self, bucket: Callable[[int], int], cost: int = 1) -> list[tuple[int, int]]:
        """Close holes if that makes steps enough smaller. Returns the (source, target) slots that
        the caller must copy caches between.

        bucket: maps a number of leading rows to the rows that a step works on. cost: rows that a
        step must be smaller by for each slot that is moved.
        """
        if self.rows == len(self._slots):
            return []
        highest = sorted(self._slots, reverse=True)
        holes = [slot for slot in sorted(self._free) if slot < len(highest)]
        # Where the rows end after so many moves: the highest slots go into the lowest holes.
        ends = [*highest[: len(holes)], len(highest) - 1]
        now, worthwhile = bucket(ends[0] + 1), 0
        for moves, end in enumerate(ends):
            if moves and now - bucket(end + 1) >= moves * cost:
                worthwhile = moves
        moved = list(zip(highest[:worthwhile], holes, strict=False))
        for source, target in moved:
            sequence = self._slots.pop(source)
            sequence.slots[sequence.slots.index(source)] = target
            self._slots[target] = sequence
        self._free = sorted({*self._free, *highest[:worthwhile]} - {*holes[:worthwhile]})
        return moved

    def release_finished(self) -> list[Sequence]:
        """Free the slots of ended sequences; returns these sequences."""
        ended = (s for s in self._running if s.finish_reason is not None)
        finished = sorted(ended, key=_lowest_slot)
        for sequence in finished:
            self._release(sequence)
        return finished

    def cancel(self, sequence: Sequence) -> bool:
        """Cancel a waiting or running sequence; False if it has already ended."""
        if sequence.finish_reason is not None:
            return False
        sequence.finish_reason = FinishReason.CANCELLED
        if not sequence.slots:
            self._queue_of(sequence).remove(sequence)
        else:
            self._release(sequence)
        return True

    def _release(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        for slot in sequence.slots:
            del self._slots[slot]
            heapq.heappush(self._free, slot)
        sequence.slots = []
        sequence.finished = self._clock()


def _lowest_slot(sequence: Sequence) -> int:
    return min(sequence.slots)
