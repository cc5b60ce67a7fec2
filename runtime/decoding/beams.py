"""Beam search, token for token equal to Hugging Face's `generate` (transformers 4.57).

Scores are float32, as in transformers: the ranking of two beams may depend on rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.decoding.base import Decoding
from runtime.decoding.candidates import Move, RowCandidates
from runtime.decoding.hypothesis import Hypothesis
from runtime.decoding.penalties import penalised
from runtime.request import Completion, FinishReason, SamplingParams

_NEVER = np.float32(-1e9)  # score of a beam that must not be chosen


class _Continued(NamedTuple):
    """A beam with one more token: row `parent`, and `place` among that row's candidates. score: a
    float32.
    """

    parent: int
    place: int
    score: float
    ends: bool


@dataclass(frozen=True, slots=True)
class _Finished:
    """A finished text and its ranking score; `text` is None in a place not yet filled."""

    text: Hypothesis | None = None
    score: float | np.float32 = -math.inf


class Beams(Decoding):
    """The `num_beams` best texts of one image, each in a row of its own."""

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """See Decoding."""
        super().__init__(prompt, sampling, eos)
        # All rows are equal at first, so only row 0's candidates count.
        self._scores = np.full(sampling.num_beams, _NEVER, np.float32)
        self._scores[0] = 0
        self._finished = [_Finished()] * sampling.num_beams
        self._can_improve = True  # a text better than the finished ones is still possible
        self._ended = False

    @property
    def _wanted(self) -> int:
        return 2 * self._sampling.num_beams  # up to `num_beams` of them may end

    @property
    def finish_reason(self) -> FinishReason | None:
        """See Decoding."""
        return self.completions()[0].finish_reason if self._ended else None

    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """See Decoding."""
        best = self._best(rows)
        ending = np.array([each.ends for each in best])
        self._finish(best, rows)
        scores = np.array([each.score for each in best], np.float32) + ending * _NEVER
        kept = np.argsort(-scores, kind="stable")[: self._sampling.num_beams].tolist()
        self._texts = [self._grown(best[at], rows) for at in kept]
        self._scores = scores[kept]
        self._can_improve = self._can_improve and self._may_improve()
        full = all(each.text is not None for each in self._finished)
        early = self._sampling.early_stopping is True and full
        self._ended = not self._can_improve or early or bool(ending.all())
        parents = [best[at].parent for at in kept]
        return [(parent, row) for row, parent in enumerate(parents) if parent != row]

    def _best(self, rows: Sequence[RowCandidates]) -> list[_Continued]:
        """The best `2 * num_beams` continuations over all rows, best first."""
        sampling, prompt, eos = self._sampling, self._prompt, self._eos
        scores = np.array([row.logprobs for row in rows], np.float32)
        if self._penalises:
            for each, row, beam in zip(scores, rows, self._texts, strict=True):
                each[:] = penalised(
                    each, np.array(row.ids), prompt, beam.token_ids, sampling, eos
                )  # fmt: skip
        scores += self._scores[:, None]
        # Of equal ones the first row's come first.
        order = np.argsort(-scores, axis=None, kind="stable")[: 2 * sampling.num_beams]
        found = (*np.divmod(order, scores.shape[1]), scores.reshape(-1)[order])
        last, stops = self.steps_left == 1, -1 if sampling.ignore_eos else eos
        return [
            _Continued(parent, place, score, last or rows[parent].ids[place] == stops)
            for parent, place, score in zip(*(each.tolist() for each in found), strict=True)
        ]

    def _grown(self, continued: _Continued, rows: Sequence[RowCandidates]) -> Hypothesis:
        text = self._texts[continued.parent].copy()
        text.add(rows[continued.parent], continued.place, self._sampling.logprobs)
        return text

    def _finish(self, best: list[_Continued], rows: Sequence[RowCandidates]) -> None:
        """Keep the best finished texts; of `best`, only the first `num_beams` may join them."""
        full = all(each.text is not None for each in self._finished)
        if (self._sampling.early_stopping is True and full) or not self._can_improve:
            return
        length = np.float32((len(self._texts[0].token_ids) + 1) ** self._sampling.length_penalty)
        for continued in best[: self._sampling.num_beams]:
            if continued.ends:
                text = self._grown(continued, rows)
                stopped = text.token_ids[-1] == self._eos and not self._sampling.ignore_eos
                text.finish_reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                self._finished.append(_Finished(text, np.float32(continued.score) / length))
        self._finished.sort(key=lambda each: -each.score)
        del self._finished[self._sampling.num_beams :]

    def _may_improve(self) -> bool:
        """Whether the best beam, by its current score, could still beat the worst finished text."""
        sampling, length = self._sampling, len(self._texts[0].token_ids)
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            length = sampling.max_new_tokens
        possible = self._scores[0] / np.float32(length**sampling.length_penalty)
        return bool(possible > min(each.score for each in self._finished))

    def new_tokens(self, reported: int) -> Completion:
        """See Decoding; empty until the end, when the best text is known."""
        return self.completions()[0] if self._ended else Completion(())

    def completions(self) -> list[Completion]:
        """See Decoding."""
        texts = (each.text for each in self._finished[: self._sampling.n])
        return [text.completion() for text in texts if text is not None]
