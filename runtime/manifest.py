"""The contract between export/ and runtime/: all that the runtime knows of a model.

`manifest.json` lies beside the graphs. Only the standard library is imported, so that export/ can
write what runtime/ reads without taking anything else along.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.errors import EngineFolderError

FORMAT = 1  # raise it when a field changes its meaning; older engines are then refused
FILE = "manifest.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of both graphs. Positions and tokens are counts, `image` is pixels."""

    image: int
    frames: int | None  # images a request holds for a video checkpoint, else None
    prefix: int  # P: positions that one request's image takes in the cache
    layers: int
    heads: int
    head: int  # D: width of one head
    vocabulary: int
    text: int  # most text tokens in a sequence, prompt included (the position embeddings' number)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids that steer the decode loop."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to an image before the encoder graph; all sizes in pixels."""

    shortest_edge: int
    crop: int
    resample: int  # PIL.Image.Resampling


@dataclass(frozen=True, slots=True)
class Variant:
    """One file of one graph. `graph` is "encoder" or "decoder"; `cache` the dtype of the K/V."""

    graph: str
    precision: str
    file: str
    sha256: str
    cache: str = "float32"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One exported model. `verification` and `versions` are for people: nothing reads them."""

    model: str
    revision: str | None
    sizes: Sizes
    tokens: SpecialTokens
    preprocessing: Preprocessing
    tokenizer_sha256: str
    variants: tuple[Variant, ...]
    verification: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def variant(self, graph: str, precision: str) -> Variant:
        """The file of `graph` in `precision`; EngineFolderError names what there is instead."""
        mine = [v for v in self.variants if v.graph == graph]
        for candidate in mine:
            if candidate.precision == precision:
                return candidate
        known = ", ".join(v.precision for v in mine) or "none"
        raise EngineFolderError(
            f"{self.model} has no {graph} in {precision} (there is: {known}); export it again"
        )

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> Manifest:
    """Read an engine folder's manifest and check that the files it names are whole (sha256).

    Raises EngineFolderError naming the file that is missing, damaged or of another format.
    """
    path = folder / FILE
    if not path.is_file():
        raise EngineFolderError(
            f"{folder} is not an engine (no {FILE}): make one with `make export MODEL=...`"
        )
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise EngineFolderError(f"{path} was written by another version: export it again")
        manifest = _parsed(content)
    except (ValueError, KeyError, TypeError, AttributeError) as cause:
        raise EngineFolderError(f"{path} can't be read: export it again ({cause!r})") from cause
    for variant in manifest.variants:
        _check_whole(folder / variant.file, variant.sha256)
    _check_whole(folder / TOKENIZER, manifest.tokenizer_sha256)
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parsed(content: dict[str, Any]) -> Manifest:
    return Manifest(
        sizes=Sizes(**content.pop("sizes")),
        tokens=SpecialTokens(**content.pop("tokens")),
        preprocessing=Preprocessing(**content.pop("preprocessing")),
        variants=tuple(Variant(**variant) for variant in content.pop("variants")),
        **content,
    )


def _check_whole(path: Path, expected: str) -> None:
    if not path.is_file():
        raise EngineFolderError(f"{path} is missing: export the engine again")
    if sha256(path) != expected:
        raise EngineFolderError(f"{path} is damaged (its sha256 differs): export the engine again")
