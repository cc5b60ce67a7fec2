"""Images in any supported form to pixels for the encoder."""

from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import InvalidImage, VignetteError
from runtime.model.manifest import Manifest
from runtime.model.preprocess import preprocess, to_pixels, to_rgb

AnyImage = bytes | bytearray | str | Path | Image.Image | np.ndarray


def pixels_of(image: AnyImage, manifest: Manifest, place: int) -> np.ndarray:
    """uint8 pixels of one image: encoded bytes, a file's path, a PIL image, or an array.

    An array holds pixels as `preprocess` returns them, or a uint8 image `[height, width, 3]` or
    `[height, width]`. place: position of the image in the call, for messages.

    Raises InvalidImage or TooManyPixels, naming the image.
    """
    try:
        return _pixels(image, manifest)
    except (VignetteError, OSError, ValueError) as cause:  # ValueError: of Pillow, or of a path
        name = f" ({image})" if isinstance(image, str | Path) else ""
        kind = type(cause) if isinstance(cause, VignetteError) else InvalidImage
        raise kind(f"image {place}{name}: {cause}") from cause


def _pixels(image: AnyImage, manifest: Manifest) -> np.ndarray:
    how = manifest.preprocessing
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.shape == manifest.sizes.pixels:
            return image.copy()  # the caller may change its own before it is encoded
        grey, coloured = image.ndim == 2, image.ndim == 3 and image.shape[2] == 3
        if image.dtype != np.uint8 or not (grey or coloured) or not image.size:
            raise InvalidImage(
                f"an array of {image.dtype} {list(image.shape)} is no image: pass uint8 of "
                f"[height, width, 3], or pixels of {list(manifest.sizes.pixels)}"
            )
        return to_pixels(Image.fromarray(image).convert("RGB"), how)
    if isinstance(image, Image.Image):
        return to_pixels(to_rgb(image), how)
    if isinstance(image, str | Path):
        image = Path(image).read_bytes()
    if not isinstance(image, bytes | bytearray):
        raise InvalidImage(
            f"{type(image).__name__} is no image: pass bytes, a path, a PIL image or an array"
        )
    return preprocess(bytes(image), how)
