"""CIDEr, BLEU-4 and ROUGE-L by the scorers of COCO's evaluation (`pycocoevalcap`).

Their Java tokeniser is replaced by NLTK's, which follows the same Penn Treebank rules. Of seven
deliberately hard texts (`tests/bench/test_quality.py`, where there is Java) both split five alike;
the other two differ at an abbreviation before the final stop, and at quotes within a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nltk.tokenize import TreebankWordTokenizer
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

METRICS = ("CIDEr", "BLEU-4", "ROUGE-L")
_RESAMPLINGS, _SEED = 2000, 1
_INTERVAL = 2.5, 97.5  # percentiles
# Tokens that COCO's evaluation drops (pycocoevalcap/tokenizer/ptbtokenizer.py). It means to drop
# brackets, too, but keeps them, because they are in lower case by then.
_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_WRITTEN = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_BRACKETS = dict(zip("(){}[]", ("-lrb-", "-rrb-", "-lcb-", "-rcb-", "-lsb-", "-rsb-"), strict=True))
_tokenizer = TreebankWordTokenizer()


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of the whole corpus, and of each caption, by the names of METRICS."""

    whole: dict[str, float]
    each: dict[str, np.ndarray]


def tokens(text: str) -> str:
    """A text's words in lower case, separated by spaces."""
    words = _tokenizer.tokenize(" ".join(text.lower().translate(_WRITTEN).split()))
    return " ".join(_BRACKETS.get(word, word) for word in words if word not in _PUNCTUATION)


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Score captions against human references of the same pictures."""
    said = {place: [tokens(text)] for place, text in enumerate(captions)}
    known = {place: [tokens(text) for text in texts] for place, texts in enumerate(references)}
    bleu, bleus = Bleu(4).compute_score(known, said, verbose=0)
    cider, ciders = Cider().compute_score(known, said)
    rouge, rouges = Rouge().compute_score(known, said)
    whole = {"CIDEr": float(cider), "BLEU-4": float(bleu[3]), "ROUGE-L": float(rouge)}
    each = {"CIDEr": np.array(ciders), "BLEU-4": np.array(bleus[3]), "ROUGE-L": np.array(rouges)}
    return Scores(whole, each)


def difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Mean of `second - first`, paired, and its 95 % bootstrap interval over the pictures."""
    differences = second - first
    chance = np.random.default_rng(_SEED)
    means = [
        differences[chance.integers(0, len(differences), len(differences))].mean()
        for _ in range(_RESAMPLINGS)
    ]
    low, high = np.percentile(means, _INTERVAL)
    return float(differences.mean()), float(low), float(high)
