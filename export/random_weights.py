"""Random-weight checkpoints in real shapes, without a download, for benchmarks and tests."""

import json
from collections.abc import Callable

import torch
from transformers import GitConfig, GitForCausalLM

from export.checkpoint import Checkpoint, Normalisation
from export.errors import ExportError
from runtime.model.manifest import Preprocessing

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
    """A checkpoint of one of SHAPES, with random weights whose captions depend on the image.

    Raises ExportError for an unknown shape.
    """
    if shape not in SHAPES:
        raise ExportError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")
    return from_config(f"random/{shape}", SHAPES[shape](), seed)


def from_config(name: str, config: GitConfig, seed: int = 0) -> Checkpoint:
    """A random-weight checkpoint of a GIT configuration, with a tokenizer of numbered words."""
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

    Freshly initialised GIT weights are so small that residuals drown the layers' outputs: every
    image gets the same caption, and comparing such captions proves nothing. Larger projections let
    the image through; a wide output layer separates the best two tokens.
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
