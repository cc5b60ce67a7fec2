"""Load checkpoints from a folder or the model hub (`export.random_weights` makes others)."""

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, GitConfig, GitForCausalLM
from transformers.image_processing_base import ImageProcessingMixin

from export.errors import ExportError, first_line
from export.tokenizer import tokenizer_json
from export.untrusted import check_config, check_folder, check_size, check_tokenizer
from runtime.model.manifest import MOST_PIXELS, Preprocessing, Sizes, SpecialTokens

_MOST = 1e6  # in a normalisation, which is computed in fp32
_OF_LAYER = re.compile(r"\.(layers?)\.(\d+)\.")  # of text, of images


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Normalisation in the encoder graph: `(pixel * rescale - mean) / std` per channel."""

    rescale: float
    mean: list[float]
    std: list[float]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An fp32 model and everything else that an engine folder needs."""

    name: str
    revision: str | None
    model: GitForCausalLM
    tokenizer_json: str
    preprocessing: Preprocessing
    normalisation: Normalisation
    trained: bool = True
    about: str = ""

    @property
    def sizes(self) -> Sizes:
        """Shapes of the model's graphs."""
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
        """Special token ids from the configuration, which `generate` uses too."""
        config = self.model.config
        return SpecialTokens(config.bos_token_id, config.eos_token_id, config.pad_token_id)


def load(model: str, revision: str | None = None) -> Checkpoint:
    """Load a GIT checkpoint from a folder or from the hub.

    Raises ExportError for a model that is unknown, not GIT, or incomplete, and for an unreachable
    hub.
    """
    if model.startswith((".", "/", "~")) and not Path(model).exists():
        raise ExportError(
            f"{model} does not exist: name a checkpoint's folder, or a model on the hub"
        )
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ExportError(f"{model} can't be loaded as a checkpoint: it has no config.json")
    try:
        check_folder(Path(model))
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        if not isinstance(config, GitConfig):
            raise ExportError(
                f"{model} is a {config.model_type} model, not GIT: name a checkpoint of the GIT "
                "family, such as microsoft/git-base-textcaps"
            )
        check_config(model, config)
        check_size(model, config)
        weights, found = GitForCausalLM.from_pretrained(
            model,
            config=config,
            revision=revision,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
        _check_whole(model, weights, found)
        weights.generation_config = _only_tokens(weights.generation_config)
        _check_tokens(model, config, weights.generation_config)
        check_tokenizer(model, revision)
        tokenizer = tokenizer_json(model, revision, config.vocab_size)
        processor, _ = ImageProcessingMixin.get_image_processor_dict(model, revision=revision)
        _check_processor(model, processor)
    # transformers computes with what a configuration says before it is checked
    except (OSError, ValueError, RuntimeError, SafetensorError, TypeError, AttributeError,
            LookupError, ArithmeticError, ImportError) as cause:  # fmt: skip
        raise ExportError(_why_not(model, cause)) from cause
    return Checkpoint(
        name=Path(model).resolve().name if Path(model).is_dir() else model,
        revision=getattr(config, "_commit_hash", None) or revision,
        model=weights.eval(),
        tokenizer_json=tokenizer,
        preprocessing=_preprocessing(model, processor, config.vision_config.image_size),
        normalisation=_normalisation(model, processor),
    )


def _only_tokens(config: GenerationConfig | None) -> GenerationConfig:
    """The special tokens of a generation_config.json. Its parameters, which `generate` would take
    for its own defaults, are printed: here each request brings its own.
    """
    asked = {} if config is None else config.to_diff_dict()
    tokens = {name: value for name, value in asked.items() if name.endswith("_token_id")}
    others = asked.keys() - tokens.keys() - {"transformers_version", "_from_model_config"}
    for name in sorted(others):
        print(
            f"left out: {name} of {asked[name]} in generation_config.json: requests say such things"
        )
    return GenerationConfig(**tokens)


def _check_tokens(model: str, config: GitConfig, generation: GenerationConfig) -> None:
    """Raise ExportError unless each special token is one, and the same for `generate`."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token, other = getattr(config, name), getattr(generation, name)
        if not isinstance(token, int) or not 0 <= token < config.vocab_size:
            raise ExportError(
                f"{model}: {name} in config.json is {token}: it must be one token, from 0 to "
                f"{config.vocab_size - 1}"
            )
        if other not in (None, token):
            raise ExportError(
                f"{model}: {name} is {token} in config.json, and {other} in "
                "generation_config.json: make them the same"
            )


def _check_whole(model: str, weights: GitForCausalLM, found: dict[str, Any]) -> None:
    """Raise ExportError unless every weight was read, has its shape, and is finite."""
    if found["mismatched_keys"]:
        name = min(found["mismatched_keys"])
        wanted = list(weights.get_parameter(name).shape)
        raise ExportError(
            f"{model}: {name} has another shape than config.json asks for ({wanted}): take both "
            "from the same checkpoint"
        )
    if lacking := sorted(found["missing_keys"]):
        raise ExportError(
            f"{model} lacks {len(lacking)} of GIT's weights, such as {lacking[0]}, which would "
            "be made up at random: give a whole GitForCausalLM checkpoint"
        )
    config = weights.config
    layers = {"layer": config.num_hidden_layers, "layers": config.vision_config.num_hidden_layers}
    surplus = [
        name
        for name in sorted(found["unexpected_keys"])
        if (layer := _OF_LAYER.search(name)) and int(layer[2]) >= layers[layer[1]]
    ]
    if surplus:
        raise ExportError(
            f"{model} has {len(surplus)} weights of layers that config.json does not ask for, such "
            f"as {surplus[0]}: take both from the same checkpoint"
        )
    for name, values in weights.named_parameters():
        if not torch.isfinite(values).all():
            raise ExportError(
                f"{model}: {name} holds values that are no numbers (NaN or infinite): the "
                "checkpoint is damaged, or its training failed"
            )


def _why_not(model: str, cause: Exception) -> str:
    if Path(model).exists():
        return f"{model} can't be loaded as a checkpoint: {first_line(cause)}"
    reasons = " ".join(type(e).__name__ + str(e) for e in _chain(cause))
    if any(sign in reasons for sign in ("ConnectionError", "LocalEntryNotFound", "couldn't connect",
                                        "Max retries", "ProxyError", "Timeout")):  # fmt: skip
        return (
            f"the model hub can't be reached for {model}: check the network, or download the "
            "checkpoint elsewhere and give its folder"
        )
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for e in _chain(cause)):
        return f"the disk is full: {model} can't be downloaded. Free some space, or set HF_HOME"
    if "not a valid model identifier" not in reasons and "RepositoryNotFound" not in reasons:
        return f"{model} can't be loaded from the hub: {first_line(cause)}"
    return (
        f"{model} is neither a folder nor a model on the hub: check the spelling "
        f"({first_line(cause)})"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _check_processor(model: str, processor: Any) -> None:
    """Raise ExportError unless a preprocessor_config.json has values of the kinds that it needs."""
    if not isinstance(processor, dict):  # transformers takes its image_processor for the whole
        raise ExportError(
            f"{model}: image_processor in preprocessor_config.json is {repr(processor)[:99]}: it "
            "must be an object"
        )
    for name in ("size", "crop_size"):
        if not isinstance(processor.get(name), dict | int | None):
            raise ExportError(
                f"{model}: {name} in preprocessor_config.json is {repr(processor[name])[:99]}: it "
                "must be a number of pixels, or an object of such"
            )


def _preprocessing(model: str, processor: dict, image_size: int) -> Preprocessing:
    """Preprocessing that runtime/ can reproduce: shortest edge, square crop; else ExportError."""
    kinds = [kind.value for kind in Image.Resampling]
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
    if processor["resample"] not in kinds:
        raise ExportError(
            f"{model}: resample in preprocessor_config.json is {processor['resample']}: Pillow has "
            f"{kinds}"
        )
    assert size is not None
    edge = size["shortest_edge"]
    if not isinstance(edge, int) or not image_size <= edge <= MOST_PIXELS:
        raise ExportError(
            f"{model}: shortest_edge in preprocessor_config.json is {edge!r}: it must be a number "
            f"of pixels, from the crop's {image_size} to {MOST_PIXELS}"
        )
    return Preprocessing(edge, image_size, int(processor["resample"]))


def _normalisation(model: str, processor: dict[str, Any]) -> Normalisation:
    """The normalisation of a processor; ExportError unless that is numbers for three channels."""
    rescale, mean, std = (processor[n] for n in ("rescale_factor", "image_mean", "image_std"))
    channels = [each if isinstance(each, list) else [] for each in (mean, std)]
    numbers = [rescale, *channels[0], *channels[1]]
    usable = all(isinstance(each, int | float) and abs(each) <= _MOST for each in numbers)
    if not usable or [len(each) for each in channels] != [3, 3] or min(std) < 1 / _MOST:
        raise ExportError(
            f"{model}: preprocessor_config.json needs a number for rescale_factor ({rescale}), and "
            f"three for image_mean ({mean}) and image_std ({std}), none above {_MOST:g} and those "
            f"not below {1 / _MOST:g}"
        )
    return Normalisation(rescale, mean, std)
