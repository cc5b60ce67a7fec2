"""Beam search, token for token equal to Hugging Face's `generate` (transformers 4.57).

Scores are float32, as in transformers: the ranking of two beams may depend on rounding.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from runtime.decoding.base import Decoding
from runtime.decoding.candidates import BeamStep, Move, RowCandidates
from runtime.decoding.penalties import penalised
from runtime.request import Completion, FinishReason, SamplingParams, TopLogprobs

_NEVER = np.float32(-1e9)  # score of a beam that must not be chosen


class _Finished(NamedTuple):
    """A finished text: the continuation `place` of a step; and its ranking score. `step` is None in
    a place not yet filled.
    """

    step: int | None = None
    place: int = 0
    score: float | np.float32 = -math.inf


class Beams(Decoding):
    """The `num_beams` best texts of one image, each in a row of its own.

    Steps are recorded as they were found; a text is read from the records, from its end backwards.
    """

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """See Decoding."""
        super().__init__(prompt, sampling, eos)
        self.can_burst = not (self._penalises or sampling.logprobs)
        self.stop = -1 if sampling.ignore_eos else eos
        self._steps: list[BeamStep] = []
        self._tops: list[list[TopLogprobs]] = []  # of each step and row, if they were asked for
        self._finished = [_Finished()] * sampling.num_beams
        self._can_improve = True  # a text better than the finished ones is still possible
        self._ended = False

    @property
    def _wanted(self) -> int:
        return 2 * self._sampling.num_beams  # up to `num_beams` of them may end

    @property
    def tokens(self) -> list[int]:
        """See Decoding."""
        last = self._steps[-1]
        return [last.ids[place] for place in last.kept]

    @property
    def steps_left(self) -> int:
        """See Decoding."""
        return self._sampling.max_new_tokens - len(self._steps)

    @property
    def scores(self) -> list[float]:
        """The score of each row's text, a float32 value."""
        if not self._steps:
            # All rows are equal at first, so only row 0's candidates count.
            return [0.0] + [float(_NEVER)] * (self._sampling.num_beams - 1)
        last = self._steps[-1]
        found = [last.scores[place] for place in last.kept]
        if self.stop in last.ids:
            for row, place in enumerate(last.kept):
                if last.ids[place] == self.stop:
                    found[row] = float(np.float32(found[row]) + _NEVER)
        return found

    @property
    def finish_reason(self) -> FinishReason | None:
        """See Decoding."""
        return self._reason(self._finished[0]) if self._ended else None

    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """See Decoding."""
        if top := self._sampling.logprobs:
            self._tops.append(
                [tuple(zip(row.ids[:top], row.logprobs[:top], strict=True)) for row in rows]
            )
        step = self._best(rows)
        self.extend((), (), [step])
        parents = [step.parents[place] for place in step.kept]
        return [(parent, row) for row, parent in enumerate(parents) if parent != row]

    def extend(
        self, ids: Sequence[int], logprobs: Sequence[float], searched: Sequence[BeamStep]
    ) -> None:
        """See Decoding."""
        for step in searched:
            if self._ended:
                return
            last = self.steps_left == 1
            self._steps.append(step)
            if last or self.stop in step.ids:
                self._finish(step, last)
            if self._full:
                self._can_improve = self._can_improve and self._may_improve()
                early = self._sampling.early_stopping is True
                self._ended = last or early or not self._can_improve

    def _best(self, rows: Sequence[RowCandidates]) -> BeamStep:
        """The best continuations over all rows."""
        sampling = self._sampling
        scores = np.array([row.logprobs for row in rows], np.float32)
        if self._penalises:
            for each, row, text in zip(scores, rows, self._generated, strict=True):
                each[:] = penalised(
                    each, np.array(row.ids), self._prompt, text, sampling, self._eos
                )  # fmt: skip
        scores += np.array(self.scores, np.float32)[:, None]
        # Of equal ones the first row's come first.
        order = np.argsort(-scores, axis=None, kind="stable")[: 2 * sampling.num_beams]
        parents, places = (each.tolist() for each in np.divmod(order, scores.shape[1]))
        ids = [rows[parent].ids[place] for parent, place in zip(parents, places, strict=True)]
        logprobs = [rows[p].logprobs[place] for p, place in zip(parents, places, strict=True)]
        best = scores.reshape(-1)[order]
        going_on = best + (np.array(ids) == self.stop) * _NEVER
        kept = np.argsort(-going_on, kind="stable")[: sampling.num_beams]
        return BeamStep(ids, parents, logprobs, best.tolist(), kept.tolist())

    @property
    def _generated(self) -> list[list[int]]:
        if not self._steps:
            return [[]] * self._sampling.num_beams
        last = len(self._steps) - 1
        return [list(self._text(last, place).token_ids) for place in self._steps[last].kept]

    @property
    def _full(self) -> bool:
        return self._finished[-1].step is not None

    def _finish(self, step: BeamStep, last: bool) -> None:
        """Keep the best finished texts; only the first `num_beams` continuations may join them.

        last: all end here, because no more tokens are allowed.
        """
        early = self._sampling.early_stopping is True and self._full
        if early or not self._can_improve:
            return
        number, beams = len(self._steps) - 1, self._sampling.num_beams
        length = np.float32(len(self._steps) ** self._sampling.length_penalty)
        for place in range(beams):
            if last or step.ids[place] == self.stop:
                score = np.float32(step.scores[place]) / length
                self._finished.append(_Finished(number, place, score))
        self._finished.sort(key=lambda each: -each.score)
        del self._finished[beams:]

    def _may_improve(self) -> bool:
        """Whether the best beam, by its current score, could still beat the worst finished text."""
        sampling, length = self._sampling, len(self._steps)
        if sampling.early_stopping == "never" and sampling.length_penalty > 0:
            length = sampling.max_new_tokens
        possible = np.float32(self.scores[0]) / np.float32(length**sampling.length_penalty)
        return bool(possible > self._finished[-1].score)

    def _reason(self, finished: _Finished) -> FinishReason:
        assert finished.step is not None
        stopped = self._steps[finished.step].ids[finished.place] == self.stop
        return FinishReason.STOP if stopped else FinishReason.LENGTH

    def _text(self, number: int, place: int, reason: FinishReason | None = None) -> Completion:
        """The text that ends with the continuation `place` of step `number`."""
        ids, logprobs, tops = [], [], []
        for at in range(number, -1, -1):
            step = self._steps[at]
            ids.append(step.ids[place])
            logprobs.append(step.logprobs[place])
            parent = step.parents[place]
            if self._tops:
                tops.append(self._tops[at][parent])
            if at:
                place = self._steps[at - 1].kept[parent]
        return Completion(tuple(ids[::-1]), tuple(logprobs[::-1]), tuple(tops[::-1]), reason)

    def new_tokens(self, reported: int) -> Completion:
        """See Decoding; empty until the end, when the best text is known."""
        return self.completions()[0] if self._ended else Completion(())

    def completions(self) -> list[Completion]:
        """See Decoding."""
        return [
            self._text(each.step, each.place, self._reason(each))
            for each in self._finished[: self._sampling.n]
            if each.step is not None
        ]
