"""Choose an engine's self-test (`runtime.execution.self_test`)."""

from pathlib import Path

import numpy as np

from export.checkpoint import Checkpoint
from export.reference import Answer, Case, OnnxGraphs, TorchGraphs, caption
from export.variants import files_of
from runtime.execution.self_test import PICTURES, TOKENS, picture
from runtime.model.manifest import Combination, SelfTest

_TRIED = 24  # pictures; those with PyTorch's largest margins are chosen


def choose(
    checkpoint: Checkpoint, folder: Path, combinations: list[Combination]
) -> SelfTest | None:
    """Pictures on which all combinations in `folder` agree with PyTorch.

    None for random weights, whose captions change easily, and if there are no such pictures.
    """
    if not checkpoint.trained:
        print("random weights: the engine has no self-test")
        return None
    sizes, special = checkpoint.sizes, checkpoint.tokens
    cases = [Case(picture(seed, sizes), [special.bos]) for seed in range(_TRIED)]
    answers = list(caption(TorchGraphs(checkpoint), sizes, special, cases, TOKENS))
    seeds = sorted(range(_TRIED), key=lambda seed: -_margin(answers[seed]))
    for candidate in combinations:
        graphs = OnnxGraphs(*files_of(candidate, folder))
        found = caption(graphs, sizes, special, [cases[seed] for seed in seeds], TOKENS)
        agreed = [a.tokens == answers[s].tokens for s, a in zip(seeds, found, strict=True)]
        seeds = [seed for seed, same in zip(seeds, agreed, strict=True) if same]
        if not seeds:
            print(f"no self-test: {candidate.name} says something else of each of its pictures")
            return None
    different = {tuple(answers[seed].tokens): seed for seed in reversed(seeds)}
    chosen = sorted(different.values(), key=seeds.index)[:PICTURES]
    return SelfTest(tuple(chosen), tuple(tuple(answers[seed].tokens) for seed in chosen))


def _margin(answer: Answer) -> float:
    """Smallest logit margin, over all steps, between the two likeliest tokens."""
    first, second = np.sort(answer.logits, axis=-1)[:, -1], np.sort(answer.logits, axis=-1)[:, -2]
    return float((first - second).min())
