"""The runner interface that an engine drives. Tests implement it without graphs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.decoding.candidates import BeamStep, RowCandidates
from runtime.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest next tokens of each row in one or several decode steps, best first.

    ids int64 and logprobs float32 `[steps, rows, K]`; logprobs are NaN where a row's computation
    failed. best_logits float32 `[steps, rows]`: logit of the first token; may be None for K = 1.
    searches: of each search and each of its images, the steps from the end of the prompt on.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    best_logits: np.ndarray | None = None
    searches: Sequence[Sequence[Sequence[BeamStep]]] = ()

    def wait(self) -> "Candidates":
        """See Pending: these are there."""
        return self

    def likeliest(self) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities of the likeliest tokens, one per step, of each row."""
        ids, logprobs = (values[..., 0].T.tolist() for values in (self.ids, self.logprobs))
        return list(zip(ids, logprobs, strict=True))

    def rows(self) -> list[RowCandidates]:
        """Each row's candidates; of a single step."""
        [ids], [logprobs] = self.ids, self.logprobs
        [best] = np.zeros((1, len(ids))) if self.best_logits is None else self.best_logits
        fields = (values.tolist() for values in (ids, logprobs, best))
        return [RowCandidates(*row) for row in zip(*fields, strict=True)]


@dataclass(frozen=True, slots=True)
class Search:
    """Images with equally many beams, which a runner chooses after each step of a burst.

    slots: of each image's beams. scores: float32 `[images, beams]` before the burst. stops: of each
    image, the token that ends a beam. forced: steps with tokens of the prompt before the first
    choice. fed: most text tokens in any of the caches.
    """

    slots: Sequence[Sequence[int]]
    scores: np.ndarray
    stops: Sequence[int]
    forced: int
    fed: int


def leading(count: int) -> list[list[int]]:
    """Slots for `count` images: one each, the lowest ones."""
    return [[slot] for slot in range(count)]


class Pending(Protocol):
    """Results of decode steps that may be running."""

    def wait(self) -> Candidates:
        """Wait for the end of the steps; called once."""


class ModelRunner(Protocol):
    """The operations by which an engine runs the graphs.

    Where `overlaps` is set, `encode` and `decode` queue their work and return while it runs, in
    the order of the calls, and there is `proceed`. Between `decode` and the wait for its result,
    `encode` may be called for slots that have no sequence in that step.
    """

    plan: Plan
    text_tokens: int
    burst: int  # most decode steps per call
    graphs: bool  # whether runs are captured as CUDA graphs
    overlaps: bool
    searches: bool  # whether `decode` takes searches
    move_cost: int  # rows that a step must be smaller by for a `move` to pay

    @property
    def on_gpu(self) -> bool:
        """Whether all state is on a GPU."""

    @property
    def runs_on(self) -> str:
        """For people: providers, precisions and slots."""

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        """Encode images; write the image K/V of `pixels[i]` into each of `slots[i]`."""

    def wait_encoded(self) -> None:
        """Wait for the end of the last `encode`."""

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
        searches: Sequence[Search] = (),
    ) -> Pending:
        """Run one decode step over the leading rows, and one more for each item of `forced`.

        tokens: the token to feed each row. fed: text tokens already in each row's cache. forced:
        tokens to feed at each further step; UNFORCED stands for the likeliest token of the step
        before. candidates: next tokens to return per row; more than 1 only for a single step.
        searches: images whose next tokens are those of their best beams instead; the runner
        reorders their text K/V, too.

        The result must be waited for before the next `decode`, `move` or `reorder`; it is valid
        until then.
        """

    def proceed(self, steps: int) -> Pending:
        """Run more steps over the rows of the last burst, from where it ends, with its searches.

        All its prompts are fed by then. Results are waited for in the order of the calls, at most
        two of them at a time.
        """

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """Copy text K/V between slots; all sources are read before any target is written.

        moves: (source, target) slots. fed: most text tokens in any of these caches.
        """

    def bucket(self, rows: int) -> int:
        """Rows that a step works on to cover `rows` leading rows."""

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from one slot to another."""
