"""Accuracy of the exported engine on scenes whose captions are held out from training.

Scenes are drawn at twice the model's image size and sent as PNG bytes, so that the whole way of a
request is judged: decoding, resizing, both graphs, the decode loop and the tokenizer.
"""

import io
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from demo import grammar, model, sprites
from demo.render import Renderer
from runtime.engine import Engine
from runtime.planning.config import EngineConfig

CAPTIONS, QUESTIONS = "captions, trained styles", "questions, trained styles"
UNSEEN = "captions, unseen style"
PROMISED = {CAPTIONS: 0.97, QUESTIONS: 0.95}
_SEED = 20_000  # far from training's
_BATCH = 64  # scenes handed to the engine at a time


@dataclass(frozen=True, slots=True)
class Score:
    """For each answer, whether it is right word for word, and its score (`Caption.score`)."""

    right: tuple[bool, ...]
    scores: tuple[float, ...]

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(self.right) / len(self.right)

    def __str__(self) -> str:
        return f"{self.share:.1%} ({sum(self.right)} of {len(self.right)})"


@dataclass(frozen=True, slots=True)
class _Question:
    image: bytes
    prompt: str | None
    answer: str


def evaluate(folder: Path, scenes: int, provider: str = "auto", beams: int = 1) -> dict[str, Score]:
    """Score an engine on `scenes` held-out scenes for each kind of question."""
    engine = Engine.open(folder, EngineConfig(provider=provider))
    print(f"{folder}: {engine.runs_on}")
    kinds = {
        CAPTIONS: _captions(sprites.TRAINED, scenes),
        QUESTIONS: _questions(sprites.TRAINED, scenes),
        UNSEEN: _captions((sprites.UNSEEN,), scenes),
    }
    return {name: _score(engine, name, asked, scenes, beams) for name, asked in kinds.items()}


def _score(engine: Engine, name: str, asked: Iterator[_Question], scenes: int, beams: int) -> Score:
    right: list[bool] = []
    scores: list[float] = []
    mistakes: Counter[tuple[str, str]] = Counter()
    with tqdm(total=scenes, desc=name, unit="scene") as progress:
        while batch := list(islice(asked, _BATCH)):
            images, prompts = [q.image for q in batch], [q.prompt for q in batch]
            said = engine.generate(images, prompts, num_beams=beams)
            for question, caption in zip(batch, said, strict=True):
                right.append(caption.text == question.answer)
                scores.append(caption.score or 0.0)
                if caption.text != question.answer:
                    mistakes[question.answer, caption.text] += 1
            progress.update(len(batch))
    for (answer, wrong), _ in mistakes.most_common(5):
        print(f"  {answer!r} was answered {wrong!r}")
    return Score(tuple(right), tuple(scores))


def _captions(styles: tuple[sprites.Style, ...], scenes: int) -> Iterator[_Question]:
    for scene, image, _ in held_out(styles, scenes):
        yield _Question(image, None, scene.caption)


def _questions(styles: tuple[sprites.Style, ...], scenes: int) -> Iterator[_Question]:
    for scene, image, rng in held_out(styles, scenes):
        question, answer = rng.choice(scene.questions)
        yield _Question(image, question, answer)


def held_out(
    styles: tuple[sprites.Style, ...], scenes: int, seed: int = _SEED
) -> Iterator[tuple[grammar.Scene, bytes, random.Random]]:
    """Held-out scenes, each with its PNG bytes and the generator; the same ones at every call."""
    rng = random.Random(seed)
    renderer = Renderer(styles, 2 * model.IMAGE_SIZE)
    for _ in range(scenes):
        scene = grammar.sample(rng, held_out=True)
        buffer = io.BytesIO()
        renderer.draw(scene, rng).image.save(buffer, "PNG")
        yield scene, buffer.getvalue(), rng
