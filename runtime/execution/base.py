"""What an engine needs of a runner; tests put a model in its place that needs no graphs."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class ModelRunner(Protocol):
    """The phases of captioning, by which an engine drives whatever runs the graphs."""

    text_tokens: int
    burst: int  # most decode steps of one call
    graphs: bool  # whether its runs are captured CUDA graphs

    @property
    def provider(self) -> str:
        """Execution provider of the encoder."""

    @property
    def precision(self) -> str:
        """The combination of encoder, decoder and cache, as the manifest names it."""

    @property
    def on_gpu(self) -> bool:
        """Whether all state is on a GPU."""

    @property
    def runs_on(self) -> str:
        """For people: what runs where."""

    @property
    def pixels_shape(self) -> tuple[int, ...]:
        """Shape of one request's pixels."""

    def encode(self, pixels: Sequence[np.ndarray], slots: Sequence[int]) -> None:
        """Put the image K/V of each of `pixels` into its slot."""

    def decode(
        self, tokens: Sequence[int], fed: Sequence[int], forced: Sequence[Sequence[int]] = ()
    ) -> np.ndarray:
        """Feed a token to each leading row, and what follows -> int64 `[steps, rows]`.

        fed: text tokens that each row's cache holds already. forced: for each further step what the
        rows are fed; NOT_A_TOKEN stands for what the step before predicts.
        """

    def bucket(self, rows: int) -> int:
        """Rows that a step works on if it is fed so many leading ones."""

    def move(self, source: int, target: int) -> None:
        """Copy a sequence's cache from one slot to another."""
