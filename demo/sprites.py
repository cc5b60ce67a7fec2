"""Emoji pictures from npm packages, as RGBA sprites. Used at training and evaluation time only.

`npm pack` fetches each package from whatever registry npm is set up with; nothing is installed.
"""

import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.nouns import NOUNS, Noun

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True, slots=True)
class Style:
    """A set of drawings of all nouns: an npm package, and the folder of its images."""

    name: str
    package: str
    version: str
    folder: str
    suffix: str
    licence: str


FLUENT = Style("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "assets", ".webp", "MIT")
GOOGLE = Style("google", "emoji-datasource-google", "16.0.0", "img/google/64", ".png", "Apache-2.0")
TWITTER = Style(
    "twitter", "emoji-datasource-twitter", "16.0.0", "img/twitter/64", ".png", "CC-BY-4.0"
)
TRAINED = (FLUENT, GOOGLE)
UNSEEN = TWITTER


class SpritesMissing(RuntimeError):
    """A sprite package, or a sprite in it, is missing; the message says what to do."""


def load(style: Style) -> dict[str, Image.Image]:
    """All sprites of a style by singular noun, RGBA, cropped to their visible pixels."""
    folder = CACHE / style.name
    if not all((folder / f"{noun.singular}.png").exists() for noun in NOUNS):
        _unpack(style, folder)
    return {noun.singular: _trimmed(folder / f"{noun.singular}.png") for noun in NOUNS}


def _trimmed(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def _unpack(style: Style, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(_fetch(style)) as tar:
        for noun in NOUNS:
            picture = Image.open(io.BytesIO(_member(tar, style, noun)))
            picture.convert("RGBA").save(folder / f"{noun.singular}.png")


def _fetch(style: Style) -> Path:
    archive = CACHE / f"{style.name}.tgz"
    if archive.exists():
        return archive
    if shutil.which("npm") is None:
        raise SpritesMissing("the sprites come from npm packages: install Node.js (with npm) first")
    print(f"fetching sprites: {style.package}@{style.version} ({style.licence})", flush=True)
    packed = subprocess.run(
        ["npm", "pack", "--silent", f"{style.package}@{style.version}"],
        cwd=CACHE, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if packed.returncode != 0:
        raise SpritesMissing(f"npm pack {style.package} failed: {packed.stderr.strip()}")
    (CACHE / packed.stdout.split()[-1]).rename(archive)
    return archive


def _member(tar: tarfile.TarFile, style: Style, noun: Noun) -> bytes:
    """A package names a picture by its code points, with or without the variation selector."""
    code = f"{ord(noun.emoji[0]):04x}"
    for name in (code, f"{code}-fe0f"):
        try:
            found = tar.extractfile(f"package/{style.folder}/{name}{style.suffix}")
        except KeyError:
            continue
        if found is not None:
            return found.read()
    raise SpritesMissing(f"{style.package}@{style.version} has no picture of {noun.singular}")
