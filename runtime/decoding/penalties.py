"""Penalties against repetition and early ends, as in Hugging Face's `generate`."""

from collections.abc import Sequence

import numpy as np

from runtime.request import SamplingParams


def penalises(sampling: SamplingParams) -> bool:
    """Whether scores depend on earlier tokens."""
    asked = sampling.no_repeat_ngram_size or sampling.min_new_tokens
    return sampling.repetition_penalty != 1 or asked > 0


def penalised(
    scores: np.ndarray,
    ids: np.ndarray,
    prompt: Sequence[int],
    generated: Sequence[int],
    sampling: SamplingParams,
    eos: int,
) -> np.ndarray:
    """Return the candidates' scores with penalties applied, float32 `[K]`.

    scores: float `[K]`, logits or log-probabilities of the tokens `ids`. prompt, generated: ids of
    the earlier tokens.
    """
    text = [*prompt, *generated]
    if sampling.repetition_penalty != 1:
        seen = np.isin(ids, list(set(text)))
        penalty = np.where(scores < 0, sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        scores = np.where(seen, scores * penalty, scores)
    if sampling.no_repeat_ngram_size:
        banned = _would_repeat(text, sampling.no_repeat_ngram_size)
        scores = np.where(np.isin(ids, list(banned)), -np.inf, scores)
    if len(generated) < sampling.min_new_tokens:
        scores = np.where(ids == eos, -np.inf, scores)
    return scores.astype(np.float32)


def _would_repeat(text: Sequence[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram that the text already contains."""
    if len(text) + 1 < size:
        return set()
    last = list(text[len(text) + 1 - size :])
    starts = range(len(text) - size + 1)
    return {text[at + size - 1] for at in starts if list(text[at : at + size - 1]) == last}
