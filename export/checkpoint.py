"""Where weights come from: a folder, the model hub, or random numbers of a known shape."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, GitConfig, GitForCausalLM
from transformers.image_processing_base import ImageProcessingMixin

from export.errors import ExportError
from runtime.manifest import Preprocessing, Sizes, SpecialTokens


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What the encoder graph does to uint8 pixels: `(pixel * rescale - mean) / std` a channel."""

    rescale: float
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model in fp32 with all that the engine folder needs beside its weights."""

    name: str
    revision: str | None
    model: GitForCausalLM
    tokenizer_json: str
    preprocessing: Preprocessing
    normalisation: Normalisation
    trained: bool = True

    @property
    def sizes(self) -> Sizes:
        """The shapes of its graphs."""
        config = self.model.config
        vision = config.vision_config
        one_image = (vision.image_size // vision.patch_size) ** 2 + 1
        frames = config.num_image_with_embedding
        return Sizes(
            image=vision.image_size,
            frames=frames,
            prefix=one_image * (frames or 1),
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            head=config.hidden_size // config.num_attention_heads,
            vocabulary=config.vocab_size,
            text=config.max_position_embeddings,
        )

    @property
    def tokens(self) -> SpecialTokens:
        """Ids from the configuration, which `generate` obeys too."""
        config = self.model.config
        return SpecialTokens(config.bos_token_id, config.eos_token_id, config.pad_token_id)


def load(model: str, revision: str | None = None) -> Checkpoint:
    """Load a GIT checkpoint from a folder or from the hub.

    Raises ExportError for an unknown model, one that is not GIT, and a hub that can't be reached.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ExportError(f"{model} can't be loaded as a checkpoint: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        if not isinstance(config, GitConfig):
            raise ExportError(
                f"{model} is a {config.model_type} model, not GIT: name a checkpoint of the GIT "
                "family, such as microsoft/git-base-textcaps"
            )
        weights = GitForCausalLM.from_pretrained(model, revision=revision, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        processor, _ = ImageProcessingMixin.get_image_processor_dict(model, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise ExportError(_why_not(model, cause)) from cause
    return Checkpoint(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        revision=getattr(config, "_commit_hash", None) or revision,
        model=weights.eval(),
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        preprocessing=_preprocessing(model, processor, config.vision_config.image_size),
        normalisation=Normalisation(
            processor["rescale_factor"], processor["image_mean"], processor["image_std"]
        ),
    )


def _why_not(model: str, cause: Exception) -> str:
    if Path(model).exists():
        return f"{model} can't be loaded as a checkpoint: {_first_line(cause)}"
    reasons = " ".join(type(e).__name__ + str(e) for e in _chain(cause))
    if any(sign in reasons for sign in ("ConnectionError", "LocalEntryNotFound", "couldn't connect",
                                        "Max retries", "ProxyError", "Timeout")):  # fmt: skip
        return (
            f"the model hub can't be reached for {model}: check the network, or download the "
            "checkpoint elsewhere and give its folder"
        )
    return (
        f"{model} is neither a folder nor a model on the hub: check the spelling "
        f"({_first_line(cause)})"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _preprocessing(model: str, processor: dict, image_size: int) -> Preprocessing:
    """Only what the runtime can repeat exactly is accepted: shortest edge, then a square crop."""
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    fields = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    missing = [f for f in fields if f not in processor]
    missing += [f for f in steps if not processor.get(f, True)]
    size, crop = processor.get("size"), processor.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    square = {"height": image_size, "width": image_size}
    if missing or "shortest_edge" not in (size or {}) or crop != square:
        raise ExportError(
            f"{model} prepares images in a way that is not supported (size {size}, crop {crop}, "
            f"without {', '.join(missing) or 'nothing'}): GIT's processors resize the shortest "
            f"edge, crop {image_size} x {image_size}, rescale and normalise"
        )
    assert size is not None
    return Preprocessing(size["shortest_edge"], image_size, int(processor["resample"]))


# --- Random weights ---------------------------------------------------------------------------

_LARGE_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
SHAPES: dict[str, Callable[[], GitConfig]] = {
    "git-base": GitConfig,
    "git-large": lambda: GitConfig(vision_config=_LARGE_VISION),
    "git-base-vqav2": lambda: GitConfig(vision_config={"image_size": 480}),
    "git-large-vqav2": lambda: GitConfig(vision_config={**_LARGE_VISION, "image_size": 420}),
    "git-base-vatex": lambda: GitConfig(num_image_with_embedding=6),
    "git-large-vatex": lambda: GitConfig(vision_config=_LARGE_VISION, num_image_with_embedding=6),
}


def random_weights(shape: str, seed: int = 0) -> Checkpoint:
    """A real checkpoint's shape with random weights that tell images apart.

    Raises ExportError for a shape that is none of SHAPES.
    """
    if shape not in SHAPES:
        raise ExportError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
    return from_config(f"random/{shape}", SHAPES[shape](), seed)


def from_config(name: str, config: GitConfig, seed: int = 0) -> Checkpoint:
    """Random weights of any GIT configuration, with a tokenizer of numbered words."""
    torch.manual_seed(seed)
    model = GitForCausalLM(config).eval()
    _spread(model)
    return Checkpoint(
        name=name,
        revision=None,
        model=model,
        tokenizer_json=_numbered_words(config),
        preprocessing=Preprocessing(
            config.vision_config.image_size, config.vision_config.image_size, resample=3
        ),
        normalisation=Normalisation(1 / 255, [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]),
        trained=False,
    )


@torch.no_grad()
def _spread(model: GitForCausalLM) -> None:
    """Scale fresh weights until captions depend on the image.

    Fresh GIT weights are so small that residuals drown what the layers say: every image gets the
    same caption, and comparing such captions proves nothing. Larger projections let the image
    through; a wide output layer keeps the best two tokens apart.
    """
    config = model.config
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        if "position_embedding" in name or "word_embedding" in name:
            weight.normal_(0, 0.3)
        elif "patch_embedding" in name:
            weight.normal_(0, 2 / weight[0].numel() ** 0.5)
        else:
            weight.normal_(0, 1.5 / weight.shape[1] ** 0.5)
    if config.num_image_with_embedding is not None:
        for embedding in model.git.img_temporal_embedding:
            embedding.normal_(0, 0.5)


def _numbered_words(config: GitConfig) -> str:
    """A word-level `tokenizer.json` of the right size: w0, w1, ... around the special tokens."""
    special = {config.pad_token_id: "[PAD]", config.bos_token_id: "[CLS]"}
    special[config.eos_token_id] = "[SEP]"
    vocabulary = {special.get(i, f"w{i}"): i for i in range(config.vocab_size)}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False}
                for i, word in sorted(special.items())
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[PAD]"},
        }
    )  # fmt: skip
