"""Draws a scene: sprites of one style on a coloured background.

`cover` maps pixels to nouns, because training predicts the noun of each patch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from demo import sprites
from demo.grammar import COLOURS, Relation, Scene
from demo.nouns import NOUNS, Noun

_BASE_COLOURS = {
    "black": (22, 22, 24),
    "white": (238, 238, 238),
    "red": (205, 45, 45),
    "green": (60, 160, 70),
    "blue": (50, 95, 205),
    "yellow": (240, 210, 60),
    "purple": (130, 65, 165),
}
_SHADE = 18  # background channels vary by up to this much to either side
_SIZES = tuple(0.26 + 0.018 * i for i in range(11))  # longest side of a sprite, share of the canvas
_ANGLES = (-12, -6, 0, 6, 12)  # degrees
_MOSAIC = 3  # sprites along each side of a mosaic
_GAP = 0.02  # between two sprites, share of the canvas


@dataclass(frozen=True, slots=True)
class Picture:
    """`image` is square RGB; `cover` uint8 `[size, size]`: 0, or 1 + index of the noun there."""

    image: Image.Image
    cover: np.ndarray


@dataclass(frozen=True, slots=True)
class _Placed:
    sprite: Image.Image
    noun: Noun
    centre: tuple[float, float]  # x, y in pixels

    @property
    def box(self) -> tuple[int, int, int, int]:
        (x, y), (w, h) = self.centre, self.sprite.size
        return round(x - w / 2), round(y - h / 2), round(x + w / 2), round(y + h / 2)


class Renderer:
    """Draws scenes of one canvas size in the given styles, a style at random for each scene."""

    def __init__(self, styles: Sequence[sprites.Style], size: int) -> None:
        self.size = size
        self._sprites = {
            style.name: {
                name: _fitted(picture, size) for name, picture in sprites.load(style).items()
            }
            for style in styles
        }
        self._shaped = lru_cache(maxsize=40_000)(self._shape)

    def draw(self, scene: Scene, rng: random.Random) -> Picture:
        """Draw `scene` at random; the same `rng` state gives the same picture."""
        style = rng.choice(sorted(self._sprites))
        placed = self._pair(scene, style, rng) if scene.relation else self._count(scene, style, rng)
        return self._compose(placed, scene.colour, rng)

    def mosaic(self, rng: random.Random) -> Picture:
        """Nine nouns in a loose grid: no scene of the grammar, but many nouns to recognise."""
        placed = []
        for cell in range(_MOSAIC**2):
            noun, style = rng.choice(NOUNS), rng.choice(sorted(self._sprites))
            sprite = self._pick(noun, style, rng.choice(_SIZES[:5]), rng)
            column, row = cell % _MOSAIC, cell // _MOSAIC
            x, y = (
                (place + 0.5 + rng.uniform(-0.1, 0.1)) * self.size / _MOSAIC
                for place in (column, row)
            )
            placed.append(_Placed(sprite, noun, (x, y)))
        return self._compose(placed, rng.choice(COLOURS), rng)

    def _compose(self, placed: list["_Placed"], colour: str, rng: random.Random) -> Picture:
        image = self._background(colour, rng)
        cover = Image.new("L", image.size)
        for p in placed:
            corner = p.box[:2]
            alpha = p.sprite.getchannel("A")
            image.paste(p.sprite, corner, alpha)
            cover.paste(1 + NOUNS.index(p.noun), corner + _plus(corner, p.sprite.size), alpha)
        return Picture(image, np.asarray(cover))

    def _background(self, colour: str, rng: random.Random) -> Image.Image:
        corners = [
            tuple(min(255, max(0, c + rng.randint(-_SHADE, _SHADE))) for c in _BASE_COLOURS[colour])
            for _ in range(4)
        ]
        tiny = Image.new("RGB", (2, 2))
        tiny.putdata(corners)
        return tiny.resize((self.size, self.size), Image.Resampling.BILINEAR)

    def _shape(
        self, style: str, noun: str, share: float, angle: int, mirrored: bool
    ) -> Image.Image:
        sprite = self._sprites[style][noun]
        if mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sprite = sprite.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        scale = share * self.size / max(sprite.size)
        width, height = (max(1, round(side * scale)) for side in sprite.size)
        return sprite.resize((width, height), Image.Resampling.LANCZOS)

    def _pick(self, noun: Noun, style: str, share: float, rng: random.Random) -> Image.Image:
        return self._shaped(style, noun.singular, share, rng.choice(_ANGLES), rng.random() < 0.5)

    def _pair(self, scene: Scene, style: str, rng: random.Random) -> list[_Placed]:
        """Both nouns well apart along the relation's axis and close to level across it."""
        assert scene.other is not None
        apart, across = rng.uniform(0.43, 0.53), rng.uniform(-0.12, 0.12)
        first = (0.5 - apart / 2, 0.5 - across / 2)
        second = (0.5 + apart / 2, 0.5 + across / 2)
        shift = rng.uniform(-0.05, 0.05), rng.uniform(-0.15, 0.15)
        centres = [(u + shift[0], v + shift[1]) for u, v in (first, second)]
        if scene.relation is Relation.ABOVE:
            centres = [(v, u) for u, v in centres]
        return [
            _Placed(
                self._pick(noun, style, rng.choice(_SIZES), rng),
                noun,
                (u * self.size, v * self.size),
            )
            for noun, (u, v) in zip((scene.noun, scene.other), centres, strict=True)
        ]

    def _count(self, scene: Scene, style: str, rng: random.Random) -> list[_Placed]:
        """`count` sprites anywhere, none touching another."""
        while True:
            placed: list[_Placed] = []
            share = rng.choice(_SIZES[: 11 - 2 * scene.count])
            for _ in range(scene.count):
                sprite = self._pick(scene.noun, style, share, rng)
                half_w, half_h = sprite.width / 2, sprite.height / 2
                centre = (
                    rng.uniform(half_w, self.size - half_w),
                    rng.uniform(half_h, self.size - half_h),
                )
                placed.append(_Placed(sprite, scene.noun, centre))
            if self._apart(placed):
                return placed

    def _apart(self, placed: list[_Placed]) -> bool:
        gap = _GAP * self.size
        boxes = [p.box for p in placed]
        return all(
            a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]
            for i, a in enumerate(boxes)
            for b in boxes[i + 1 :]
        )


def _fitted(picture: Image.Image, size: int) -> Image.Image:
    """Shrink a sprite to the canvas: rotating more pixels than are shown only costs time."""
    fitted = picture.copy()
    fitted.thumbnail((size, size), Image.Resampling.LANCZOS)
    return fitted


def _plus(corner: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    return corner[0] + size[0], corner[1] + size[1]
