"""The runner that an engine drives. Tests have one that needs no graphs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from runtime.decoding.candidates import RowCandidates
from runtime.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Candidates:
    """The likeliest next tokens of a decode step's rows, best first.

    ids int64 and logprobs float32 `[steps, rows, K]`; logprobs are NaN where a row's numbers broke
    down. best_logits float32 `[steps, rows]`: of the first, before they were normalised; only where
    more than one was asked for.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    best_logits: np.ndarray | None = None

    def rows(self) -> list[list[RowCandidates]]:
        """By step and row, as lists."""
        best = np.zeros(self.ids.shape[:2]) if self.best_logits is None else self.best_logits
        return [
            [
                RowCandidates(*row)
                for row in zip(ids.tolist(), logprobs.tolist(), logits.tolist(), strict=True)
            ]
            for ids, logprobs, logits in zip(self.ids, self.logprobs, best, strict=True)
        ]


def leading(count: int) -> list[list[int]]:
    """One slot for each of `count` images, the first ones."""
    return [[slot] for slot in range(count)]


class ModelRunner(Protocol):
    """The phases of captioning, by which an engine drives whatever runs the graphs."""

    plan: Plan
    text_tokens: int
    burst: int  # most decode steps of one call
    graphs: bool  # whether its runs are captured CUDA graphs

    @property
    def on_gpu(self) -> bool:
        """Whether all state is on a GPU."""

    @property
    def runs_on(self) -> str:
        """For people: what runs where."""

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[Sequence[int]]) -> None:
        """Put the image K/V of each of `pixels` into its slots."""

    def decode(
        self,
        tokens: Sequence[int],
        fed: Sequence[int],
        forced: Sequence[Sequence[int]] = (),
        candidates: int = 1,
    ) -> Candidates:
        """Feed a token to each leading row, and what follows.

        fed: text tokens that each row's cache holds already. forced: for each further step what the
        rows are fed; UNFORCED stands for what the step before found likeliest. candidates: how many
        next tokens are asked for; more than one of one step alone. Valid until the next call.
        """

    def reorder(self, moves: Sequence[tuple[int, int]], fed: int) -> None:
        """Copy text K/V from slots to others, all of them before any is overwritten.

        moves: (source, target). fed: text tokens that each of these caches holds at most.
        """

    def bucket(self, rows: int) -> int:
        """Rows that a step works on if it is fed so many leading ones."""

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from one slot to another."""
