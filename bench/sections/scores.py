"""Accuracy with beams, and what scores predict: the demo model on held-out scenes."""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench.common.settings import Settings

_BEAMS = 4
_PARTS = 10


def measure(settings: Settings) -> dict[str, Any]:
    """For each kind of question: accuracy, greedy and with beams; greedy accuracy by tenths of the
    score; and how well scores separate right answers from wrong ones.
    """
    found = {name: _evaluated(settings.scenes, n) for name, n in (("greedy", 1), ("beams", _BEAMS))}
    kinds: dict[str, Any] = {}
    for kind, greedy in found["greedy"].items():
        answers = sorted(zip(greedy["scores"], greedy["right"], strict=True))
        kinds[kind] = {
            "shares": {
                "greedy": _share(greedy["right"]),
                f"{_BEAMS} beams": _share(found["beams"][kind]["right"]),
            },
            "tenths": tenths(answers),
            "told_apart": told_apart(answers),
        }
    return {"kinds": kinds}


def _evaluated(scenes: int, beams: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "scores.json"
        command = [
            sys.executable, "-m", "demo", "evaluate", "--scenes", str(scenes),
            "--beams", str(beams), "--json", str(output),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not output.exists():  # not its status, which also tells whether the model card was met
            raise RuntimeError(f"the demo model can't be evaluated: {done.stderr[-500:]}")
        content: dict[str, Any] = json.loads(output.read_text())
        return content


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def tenths(answers: list[tuple[float, bool]]) -> list[tuple[float, float]]:
    """Mean score and accuracy of each tenth. answers: (score, right), sorted by score."""
    bounds = [len(answers) * part // _PARTS for part in range(_PARTS + 1)]
    parts = [answers[a:b] for a, b in itertools.pairwise(bounds) if b > a]
    return [
        (statistics.mean(score for score, _ in part), _share([right for _, right in part]))
        for part in parts
    ]


def told_apart(answers: list[tuple[float, bool]]) -> float:
    """Area under the ROC curve: how often a right answer scores higher than a wrong one, of equal
    scores half. answers: (score, right), sorted; 1 if all are right, or all wrong.
    """
    below, higher = 0, 0.0
    for _, equal in itertools.groupby(answers, key=itemgetter(0)):
        judged = [right for _, right in equal]
        right, wrong = sum(judged), len(judged) - sum(judged)
        higher += right * (below + wrong / 2)
        below += wrong
    pairs = below * (len(answers) - below)
    return higher / pairs if pairs else 1.0
