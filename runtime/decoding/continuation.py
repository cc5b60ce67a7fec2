"""Independent texts: each takes its likeliest token (greedy) or draws one (sampling)."""

from collections.abc import Sequence

import numpy as np

from runtime.decoding.base import Decoding
from runtime.decoding.candidates import BeamStep, Move, RowCandidates
from runtime.decoding.hypothesis import Hypothesis
from runtime.decoding.penalties import penalised
from runtime.request import Completion, FinishReason, SamplingParams

_MIN_TEMPERATURE = 1e-3  # lowest temperature: below it, the likeliest token is drawn anyway


class Continuation(Decoding):
    """`n` texts of one image, one row each, until the last text ends."""

    def __init__(self, prompt: Sequence[int], sampling: SamplingParams, eos: int) -> None:
        """See Decoding."""
        super().__init__(prompt, sampling, eos)
        self._texts = [Hypothesis() for _ in range(sampling.rows)]
        self.can_burst = sampling.n == 1 and not (
            self._penalises or sampling.temperature or sampling.logprobs
        )

    @property
    def _wanted(self) -> int:
        return self._sampling.top_k if self._sampling.temperature else 1

    @property
    def _generated(self) -> list[list[int]]:
        return [text.token_ids for text in self._texts]

    @property
    def tokens(self) -> list[int]:
        """See Decoding."""
        return [ids[-1] for ids in self._generated]

    @property
    def steps_left(self) -> int:
        """See Decoding."""
        return self._sampling.max_new_tokens - max(map(len, self._generated))

    @property
    def finish_reason(self) -> FinishReason | None:
        """See Decoding."""
        first, *others = self._texts
        return first.finish_reason if all(text.finish_reason for text in others) else None

    def advance(self, rows: Sequence[RowCandidates]) -> list[Move]:
        """See Decoding."""
        for index, (text, row) in enumerate(zip(self._texts, rows, strict=True)):
            if text.finish_reason is not None:
                continue
            text.add(row, self._chosen(index, row), self._sampling.logprobs)
            if text.token_ids[-1] == self._eos and not self._sampling.ignore_eos:
                text.finish_reason = FinishReason.STOP
            elif len(text.token_ids) >= self._sampling.max_new_tokens:
                text.finish_reason = FinishReason.LENGTH
        return []

    def extend(
        self, ids: Sequence[int], logprobs: Sequence[float], searched: Sequence[BeamStep]
    ) -> None:
        """See Decoding; of a single text."""
        [text], sampling = self._texts, self._sampling
        left = self.steps_left
        stop = not sampling.ignore_eos and self._eos in ids and ids.index(self._eos) < left
        taken = ids.index(self._eos) + 1 if stop else min(left, len(ids))
        text.token_ids += ids[:taken]
        text.logprobs += logprobs[:taken]
        if stop:
            text.finish_reason = FinishReason.STOP
        elif taken == left:
            text.finish_reason = FinishReason.LENGTH

    def _chosen(self, index: int, row: RowCandidates) -> int:
        """Index, among the row's candidates, of the next token of text `index`."""
        sampling, before = self._sampling, self._texts[index].token_ids
        logits = np.array(row.logprobs, np.float64) - row.logprobs[0] + row.best_logit
        if self._penalises:
            scores, ids = logits.astype(np.float32), np.array(row.ids)
            logits = penalised(scores, ids, self._prompt, before, sampling, self._eos)
        if not sampling.temperature:
            return int(logits.argmax())
        # Keyed by seed, text and token position, so that the draws depend neither on retries nor on
        # the rest of the batch.
        key = np.array([sampling.seed, index], np.uint64)
        draw = np.random.Generator(np.random.Philox(key=key, counter=len(before))).random()
        return drawn(logits, sampling, draw)

    def new_tokens(self, reported: int) -> Completion:
        """See Decoding."""
        return self._texts[0].completion().after(reported)

    def completions(self) -> list[Completion]:
        """See Decoding."""
        return [text.completion() for text in self._texts]


def drawn(logits: np.ndarray, sampling: SamplingParams, draw: float) -> int:
    """Index of a candidate, drawn by temperature, `top_k` and `top_p`.

    logits: float `[K]` of the likeliest tokens. draw: uniform in [0, 1).
    """
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    scaled = np.asarray(logits, np.float64)[order] / max(sampling.temperature, _MIN_TEMPERATURE)
    weights = np.exp(scaled - scaled[0])
    share = weights.cumsum() / weights.sum()
    # Keep the fewest tokens that together reach top_p: those preceded by a smaller share.
    kept = 1 + int((share[:-1] < sampling.top_p).sum())
    return int(order[np.searchsorted(share[:kept] / share[kept - 1], draw, side="right")])
