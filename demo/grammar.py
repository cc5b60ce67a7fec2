"""Scenes: their captions and questions, and which captions are held out from training.

Only the standard library is imported, so that the grammar can be read and tested alone.
"""

import hashlib
import random
from dataclasses import dataclass
from enum import StrEnum

from demo.nouns import NOUNS, Noun

COLOURS = ("black", "white", "red", "green", "blue", "yellow", "purple")
COUNTS = ("one", "two", "three")
HELD_OUT_SHARE = 20  # one caption in this many is kept for evaluation


class Relation(StrEnum):
    """Position of the first noun of a pair relative to the second."""

    LEFT_OF = "to the left of"
    ABOVE = "above"

    @property
    def inverse(self) -> str:
        """The same fact, stated from the second noun."""
        return {"to the left of": "to the right of", "above": "below"}[self.value]

    @property
    def place(self) -> str:
        """Where the first noun is in the picture."""
        return self.value.removesuffix(" of")

    @property
    def opposite_place(self) -> str:
        """Where the second noun is in the picture."""
        return self.inverse.removesuffix(" of")


@dataclass(frozen=True, slots=True)
class Scene:
    """Either `count` times one noun, or one noun in a relation to another."""

    noun: Noun
    colour: str
    count: int = 1
    relation: Relation | None = None
    other: Noun | None = None

    @property
    def caption(self) -> str:
        """The one caption that is right for this scene, word for word."""
        if self.relation and self.other:
            what = f"{self.noun.with_article} {self.relation} {self.other.with_article}"
        elif self.count == 1:
            what = self.noun.with_article
        else:
            what = f"{COUNTS[self.count - 1]} {self.noun.plural}"
        return f"{what} on a {self.colour} background"

    @property
    def questions(self) -> list[tuple[str, str]]:
        """(question, answer) pairs; answers have one or two words."""
        asked = [("what colour is the background", self.colour)]
        if self.relation and self.other:
            # The last four need positions: naming the other noun does not answer them.
            asked += [
                (f"what is {self.relation} the {self.other.singular}", self.noun.singular),
                (f"what is {self.relation.inverse} the {self.noun.singular}", self.other.singular),
                (f"what is {self.relation.place}", self.noun.singular),
                (f"what is {self.relation.opposite_place}", self.other.singular),
                (f"the {self.noun.singular} is", self.relation.place),
                (f"the {self.other.singular} is", self.relation.opposite_place),
            ]
        else:
            asked.append((f"how many {self.noun.plural} are there", COUNTS[self.count - 1]))
        return asked

    @property
    def held_out(self) -> bool:
        """Whether this caption is held out from training; by hash, so equal on every machine."""
        digest = hashlib.sha256(self.caption.encode()).digest()
        return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def sample(rng: random.Random, *, held_out: bool, pairs: float = 0.5) -> Scene:
    """Draw a scene from the training captions or the held-out ones; `pairs` show two nouns."""
    while True:
        scene = _draw(rng, pairs)
        if scene.held_out == held_out:
            return scene


def _draw(rng: random.Random, pairs: float) -> Scene:
    colour = rng.choice(COLOURS)
    if rng.random() >= pairs:
        return Scene(rng.choice(NOUNS), colour, count=rng.randint(1, 3))
    noun, other = rng.sample(NOUNS, 2)
    return Scene(noun, colour, relation=rng.choice(list(Relation)), other=other)


def vocabulary() -> list[str]:
    """Every word that a caption, a question or an answer can hold, sorted."""
    words: set[str] = {"a", "an"}
    for noun in NOUNS:
        other = next(n for n in NOUNS if n is not noun)
        scenes = [Scene(noun, "red", count=c) for c in (1, 2, 3)]
        scenes += [Scene(noun, "red", relation=r, other=other) for r in Relation]
        for scene in scenes:
            words.update(scene.caption.split())
            for question, answer in scene.questions:
                words.update(question.split(), answer.split())
    return sorted(words | set(COLOURS))
