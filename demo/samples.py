"""The committed sample scenes, which the page shows and tests caption; and pictures in bulk."""

import json
import random
from pathlib import Path

from demo import grammar, sprites
from demo.grammar import Relation, Scene
from demo.nouns import NOUNS, Noun
from demo.render import Renderer

FOLDER = Path(__file__).parent / "samples"
CAPTIONS = "captions.json"  # file name -> caption and questions
_SIZE = 256  # pixels


def _noun(name: str) -> Noun:
    return next(noun for noun in NOUNS if noun.singular == name)


def _pair(first: str, relation: Relation, second: str, colour: str) -> Scene:
    return Scene(_noun(first), colour, relation=relation, other=_noun(second))


SCENES = {
    "owl": Scene(_noun("owl"), "purple"),
    "cats": Scene(_noun("cat"), "green", count=2),
    "eagle-shark": _pair("eagle", Relation.ABOVE, "shark", "blue"),
    "tractor-balloon": _pair("tractor", Relation.LEFT_OF, "balloon", "black"),
    "donuts": Scene(_noun("donut"), "white", count=3),
    "robot-guitar": _pair("robot", Relation.LEFT_OF, "guitar", "yellow"),
    "rocket-pizza": _pair("rocket", Relation.ABOVE, "pizza", "red"),
    "pandas": Scene(_noun("panda"), "red", count=3),
    "umbrella": Scene(_noun("umbrella"), "yellow"),
    "snowman-cactus": _pair("snowman", Relation.LEFT_OF, "cactus", "purple"),
    "hot-dogs": Scene(_noun("hot dog"), "blue", count=2),
    "octopus-crown": _pair("octopus", Relation.ABOVE, "crown", "white"),
}


def draw() -> None:
    """Write every sample as PNG and their captions and questions beside them."""
    renderer = Renderer(sprites.TRAINED, _SIZE)
    said = {}
    for name, scene in SCENES.items():
        renderer.draw(scene, random.Random(name)).image.save(FOLDER / f"{name}.png", optimize=True)
        said[f"{name}.png"] = {"caption": scene.caption, "questions": dict(scene.questions)}
    (FOLDER / CAPTIONS).write_text(json.dumps(said, indent=2) + "\n")


def draw_many(folder: Path, count: int) -> None:
    """Fill `folder` with scenes from training's captions, to calibrate and judge exports."""
    folder.mkdir(parents=True, exist_ok=True)
    renderer, rng = Renderer(sprites.TRAINED, _SIZE), random.Random("calibration")
    for index in range(count):
        scene = grammar.sample(rng, held_out=False)
        renderer.draw(scene, rng).image.save(folder / f"{index:04}.png")
