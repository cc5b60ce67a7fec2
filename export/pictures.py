"""Pictures to compare on: the user's, prepared by Hugging Face's processor, or generated ones.

Hugging Face's processor, not runtime/'s, prepares them, so that verification is independent of the
code it checks. Only the steps left to the processor's caller are runtime/'s: orientation,
transparency, 16 bits.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import CLIPImageProcessor

from export.errors import ExportError
from runtime.errors import InvalidImage, TooManyPixels
from runtime.model.manifest import Preprocessing, Sizes
from runtime.model.preprocess import SUFFIXES, decode

LEAST_PICTURES = 16  # fewest for a meaningful calibration and gate
_MOST_PICTURES = 400  # each is captioned by PyTorch and by every combination of variants


def from_folder(folder: Path, how: Preprocessing, sizes: Sizes) -> list[np.ndarray]:
    """All images in a folder and its subfolders, sorted by path: uint8 `[3, S, S]` each.

    At most _MOST_PICTURES, evenly spaced. Unreadable files are listed and left out; ExportError if
    fewer than LEAST_PICTURES are left.
    """
    if sizes.frames is not None:
        raise ExportError("--images is for single-image models: a video row needs several frames")
    if not folder.is_dir():
        raise ExportError(f"{folder} is not a folder of images")
    processor = CLIPImageProcessor(
        size={"shortest_edge": how.shortest_edge},
        crop_size={"height": how.crop, "width": how.crop},
        resample=how.resample,
        do_rescale=False,
        do_normalize=False,
    )
    pixels: list[np.ndarray] = []
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if len(paths) > _MOST_PICTURES:
        print(f"{folder} holds {len(paths)} images: {_MOST_PICTURES} of them, evenly, are used")
        paths = [paths[i * len(paths) // _MOST_PICTURES] for i in range(_MOST_PICTURES)]
    for path in paths:
        try:
            image = decode(path.read_bytes())
        except (InvalidImage, TooManyPixels, OSError) as cause:
            print(f"left out: {path} ({cause})")
            continue
        # Without the format, the processor would misread a picture three pixels high.
        made = processor(image, return_tensors="np", input_data_format="channels_last")
        pixels.append(made["pixel_values"][0].astype(np.uint8))
    if len(pixels) < LEAST_PICTURES:
        raise ExportError(
            f"{folder} holds {len(pixels)} images that can be read: calibration and comparison "
            f"take {LEAST_PICTURES} or more"
        )
    return pixels


def generated(rng: np.random.Generator, sizes: Sizes) -> np.ndarray:
    """Coloured blocks with noise, which differ at a large scale, as pictures do."""
    count, size = sizes.frames or 1, sizes.image
    cells = int(rng.integers(2, 7))
    blocks = rng.integers(0, 256, (count, 3, cells, cells))
    index = np.arange(size) * cells // size
    picture = blocks[:, :, index][:, :, :, index] + rng.normal(0, 12, (count, 3, size, size))
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    return pixels if sizes.frames else pixels[0]


def rows(rng: np.random.Generator, sizes: Sizes, given: list[np.ndarray]) -> Iterator[np.ndarray]:
    """An endless iterator of encoder rows: `given`, then generated ones."""
    yield from given
    while True:
        yield generated(rng, sizes)
