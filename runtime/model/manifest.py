"""The contract between export/ and runtime/: everything the runtime knows about a model.

`manifest.json` lies beside the graphs.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, convert

from runtime.errors import EngineFolderError

FORMAT = 6  # increment when a field's meaning changes; older engines are then refused
FILE = "manifest.json"
PLAN = "plan.json"  # of `make tune`
PARTIAL_PLAN = f".{PLAN}.partial"  # how the name begins of one that is being written
# Folders of graphs that providers compiled for a machine.
TENSORRT_CACHE, OPENVINO_CACHE = "tensorrt", "compiled"
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights.data"
UNFORCED = -1  # stands for the likeliest token of the step before
HELPERS = ("insert", "reorder", "candidates", "search")  # graphs without weights, for a device


Count = Annotated[int, Meta(gt=0)]


def kv_names(layers: int) -> list[str]:
    """Names of a graph's K/V tensors, without the prefix: 0.key, 0.value, 1.key, ..."""
    return [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


MOST_PIXELS, _MOST = 4096, 2**20  # of an image's side; of positions and tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Shapes of both graphs. `prefix` and `text` are counts of positions, `image` is in pixels."""

    image: Count
    frames: Count | None  # images per request of a video checkpoint, else None
    prefix: Count  # P: K/V cache positions of one request's image
    layers: Count
    heads: Count
    head: Count  # D: head size
    vocabulary: Count
    text: Count  # most text tokens per sequence, prompt included (number of position embeddings)

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of one request's pixels: `[3, S, S]`, or `[F, 3, S, S]` for video checkpoints."""
        one = (3, self.image, self.image)
        return one if self.frames is None else (self.frames, *one)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that the decode loop depends on."""

    bos: int
    eos: int
    pad: int


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Image preprocessing ahead of the encoder graph; sizes in pixels."""

    shortest_edge: Count
    crop: Count
    resample: Annotated[int, Meta(ge=0, le=5)]  # PIL.Image.Resampling


@dataclass(frozen=True, slots=True)
class Variant:
    """One graph in one precision, for one type of K/V cache.

    graph: "encoder" or "decoder"; on a device, and without weights, "insert" copies image K/V into
        slots, "reorder" copies text K/V between slots, "candidates" finds the likeliest tokens,
        "search" chooses beams.
    precision: fp32, int8 (activations quantised dynamically), int8-static (an encoder with
        activation scales from calibration, for OpenVINO), fp16, fp16-fused (an encoder with
        attention in one node, for CUDA).
    cache: dtype of the K/V that the encoder writes and the decoder reads: float32, int8 or
        float16 (kept on a GPU).
    file: name in the engine folder. All graphs store their weights in WEIGHTS there, equal
        tensors once.
    weights: bytes of the graph's weights in memory.
    """

    graph: str
    precision: str
    cache: str
    file: str
    weights: int = 0


@dataclass(frozen=True, slots=True)
class Combination:
    """An encoder and a decoder that were proven together.

    images: captions that were compared; a trained model's pictures are captioned without a prompt
        and with one. agreement: share of them that equal fp32 PyTorch's; None for random weights,
        whose captions prove nothing. beams: the same with 4 beams, on fewer pictures.
    """

    encoder: str
    decoder: str
    cache: str
    images: int
    agreement: float | None
    beams: float | None = None

    @property
    def name(self) -> str:
        """Encoder precision, decoder precision and cache dtype, such as fp32/int8/int8."""
        return f"{self.encoder}/{self.decoder}/{self.cache}"


@dataclass(frozen=True, slots=True)
class SelfTest:
    """Picture seeds (`runtime.execution.self_test`), and the tokens of PyTorch and all variants."""

    seeds: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]


EXACT = "fp32/fp32/float32"  # the combination every engine has; its captions equal PyTorch's


@dataclass(frozen=True, slots=True)
class Manifest:
    """One exported model. `verification` and `versions` are for people only."""

    model: str
    revision: str | None
    sizes: Sizes
    tokens: SpecialTokens
    preprocessing: Preprocessing
    files: dict[str, str]  # name -> sha256 of everything beside the manifest
    variants: tuple[Variant, ...]
    combinations: tuple[Combination, ...]
    self_test: SelfTest | None = None  # None for random weights
    about: str = ""  # a line for people: what the model knows
    verification: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that identify all that decides a caption, without precision."""
        deciding = self.files, asdict(self.sizes), asdict(self.tokens), asdict(self.preprocessing)
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]

    def check_fingerprint(self, folder: Path, expected: str | None) -> None:
        """Raise EngineFolderError unless the engine is the expected one; None: any is."""
        if expected not in (None, self.fingerprint):
            raise EngineFolderError(
                f"{folder} has another engine than the service or the run started with: put the "
                "first one back, or start again"
            )

    def combination(self, name: str) -> Combination:
        """The combination `name`. Raises EngineFolderError, listing the available ones."""
        for candidate in self.combinations:
            if candidate.name == name:
                return candidate
        raise EngineFolderError(
            f"{self.model} has no combination {name}: use one of "
            f"{', '.join(c.name for c in self.combinations)}"
        )

    def variant(self, graph: str, combination: Combination) -> Variant:
        """The variant of `graph` that a combination uses."""
        precision = combination.encoder if graph == "encoder" else combination.decoder
        wanted = (graph, precision, combination.cache)
        return next(v for v in self.variants if (v.graph, v.precision, v.cache) == wanted)

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        content = {"format": FORMAT, **asdict(self)}
        (folder / FILE).write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> Manifest:
    """Read an engine folder's manifest; EngineFolderError if it is missing or of another format."""
    path = folder / FILE
    if not path.is_file():
        raise EngineFolderError(
            f"{folder} is not an engine (no {FILE}): make one with `make export MODEL=...`"
        )
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise EngineFolderError(
                f"{path} was written by another version: export it again, with "
                f"`make export MODEL={content.get('model', '...')} NAME={folder.name}`"
            )
        manifest = convert(content, Manifest)
        _check_named(manifest)
    except OSError as cause:
        raise EngineFolderError(f"{path} can't be read: {cause.strerror}") from cause
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
        raise EngineFolderError(f"{path} can't be read: export it again ({cause!r})") from cause
    return manifest


def load(folder: Path) -> Manifest:
    """Read an engine folder's manifest and check the sha256 of all files it names.

    Raises EngineFolderError naming the file that is missing, damaged or of another format.
    """
    manifest = read(folder)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for _ in pool.map(
            check_whole, map(folder.joinpath, manifest.files), manifest.files.values()
        ):
            pass
    return manifest


def sha256(path: Path) -> str:
    """Hex digest of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_named(manifest: Manifest) -> None:
    """Raise ValueError unless each file used has a sha256 and lies directly in the folder, and each
    combination has its graphs.
    """
    used = {TOKENIZER, WEIGHTS, *(v.file for v in manifest.variants)}
    if unproven := sorted(used - manifest.files.keys()):
        raise ValueError(f"it has no sha256 of {unproven[0]!r}")
    if outside := [name for name in manifest.files if Path(name).name != name]:
        raise ValueError(f"{outside[0]!r} is no file of the folder")
    there = {(v.graph, v.precision, v.cache) for v in manifest.variants}
    for each in manifest.combinations:
        wanted = {(graph, getattr(each, graph), each.cache) for graph in ("encoder", "decoder")}
        if each.cache == "float16":
            wanted |= {(graph, each.decoder, each.cache) for graph in HELPERS}
        if missing := sorted(graph for graph, *_ in wanted - there):
            raise ValueError(f"it has no graph {missing[0]!r} of {each.name}")
    sizes, tokens = manifest.sizes, manifest.tokens
    if not 0 <= min(tokens.bos, tokens.eos) <= max(tokens.bos, tokens.eos) < sizes.vocabulary:
        raise ValueError(f"its tokens are not of a vocabulary of {sizes.vocabulary}")
    if (
        sizes.image > MOST_PIXELS
        or max(sizes.prefix, sizes.vocabulary, sizes.text, sizes.frames or 1) > _MOST
    ):
        raise ValueError("its sizes are those of no checkpoint")
    prepared = manifest.preprocessing
    if prepared.crop != sizes.image or not prepared.crop <= prepared.shortest_edge <= MOST_PIXELS:
        raise ValueError(f"its images are resized or cropped to other sizes ({prepared})")
    if (test := manifest.self_test) and len(test.seeds) != len(test.tokens):
        raise ValueError("its self-test has not as many captions as pictures")


def check_whole(path: Path, expected: str) -> None:
    """Raise EngineFolderError unless a file has the expected sha256."""
    if not path.is_file():
        raise EngineFolderError(f"{path} is missing: export the engine again")
    try:
        found = sha256(path)
    except OSError as cause:
        raise EngineFolderError(f"{path} can't be read: {cause.strerror}") from cause
    if found != expected:
        raise EngineFolderError(f"{path} is damaged (its sha256 differs): export the engine again")
