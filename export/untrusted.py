"""Checks of a checkpoint that somebody else made, before transformers acts on what it says.

transformers runs code that it finds, opens the paths that a configuration names, and follows links:
an engine would hold the content of another file, and give it away in captions.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GitConfig, GitForCausalLM
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from export.errors import ExportError

_ATTENTION = (None, "eager", "sdpa")
_WEIGHTS = (".safetensors", ".bin")
_UNREAD = ("special_tokens_map_file", "added_tokens_file")  # by transformers
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MOST_LABELS, _MOST_FRAMES = 10_000, 1000
_MOST_LAYERS, _MOST_PARAMETERS = 500, 4 * 10**9  # the largest GIT has 24, and 4 * 10**8
# What the graphs are made with, whatever a configuration asks for: none of it changes a number.
_SWITCHES = {
    "return_dict": True, "torchscript": False, "output_attentions": False,
    "output_hidden_states": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False,
}  # fmt: skip


def check_folder(folder: Path) -> None:
    """Check a local checkpoint's files. Raises ExportError for code, links to files elsewhere, and
    JSON that is no object; OSError and ValueError for what can't be read.
    """
    code = folder / "custom_generate"
    if os.path.lexists(code):
        raise ExportError(
            f"{code} is code, which an export does not run: delete it to export the weights for "
            "decoding as usual"
        )
    own = [folder.resolve()]
    if own[0].parent.name == "snapshots":  # of the hub's cache, which links files to its blobs
        own.append(own[0].parent.with_name("blobs"))
    for path in folder.iterdir() if folder.is_dir() else ():
        target = path.resolve()
        if path.suffix not in _WEIGHTS and not any(target.is_relative_to(each) for each in own):
            raise ExportError(f"{path} is a link to {target}: put a copy there if that is meant")
    for name in ("config.json", "preprocessor_config.json", "generation_config.json", *_INDICES):
        path = folder / name
        content = json.loads(path.read_bytes()) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ExportError(f"{path} is no JSON object: take it from the checkpoint again")
        for part in (content, content.get("vision_config")):
            labels = part.get("num_labels") if isinstance(part, dict) else None
            if isinstance(labels, int) and labels > _MOST_LABELS:  # transformers names each
                raise ExportError(f"{path}: num_labels is {labels}: GIT has none, delete it there")
        shards = content.get("weight_map") if name in _INDICES else None
        for shard in shards.values() if isinstance(shards, dict) else ():
            _check_name(path, "a shard", shard)


def check_config(model: str, config: GitConfig) -> None:
    """Check a configuration, and set its switches. Raises ExportError for code from elsewhere,
    quantised weights, and values that GIT can't be computed with.
    """
    if getattr(config, "quantization_config", None):
        raise ExportError(
            f"{model} has quantised weights (quantization_config in config.json): export the "
            "checkpoint that they were made from"
        )
    _check_name(f"{model}: config.json", "weights", getattr(config, "transformers_weights", None))
    frames = config.num_image_with_embedding
    if frames is not None and not (isinstance(frames, int) and 1 <= frames <= _MOST_FRAMES):
        raise ExportError(
            f"{model}: num_image_with_embedding in config.json is {frames}: it must be null, or a "
            f"number of images, {_MOST_FRAMES} at most"
        )
    for part in (config, config.vision_config):
        if part._attn_implementation not in _ATTENTION:
            raise ExportError(
                f"{model}: config.json asks for attention by {part._attn_implementation}, which "
                "may be code from elsewhere: delete _attn_implementation there"
            )
        for name, kind, usable in (
            ("layer_norm_eps", int | float, lambda eps: math.isfinite(eps) and eps >= 0),
            ("hidden_act", str, bool),
        ):
            value = getattr(part, name)
            if not isinstance(value, kind) or not usable(value):
                raise ExportError(
                    f"{model}: {name} in config.json is {repr(value)[:99]}: GIT can't use that"
                )
        for name, value in _SWITCHES.items():
            setattr(part, name, value)


def check_size(model: str, config: GitConfig) -> None:
    """Raise ExportError for a configuration of far more than the weights hold, before transformers
    takes memory for all that it names, and ValueError and the like for one of which no model can be
    built.
    """
    layers = max(config.num_hidden_layers, config.vision_config.num_hidden_layers)
    if layers > _MOST_LAYERS:
        raise ExportError(
            f"{model}: config.json asks for {layers} layers, and an export takes {_MOST_LAYERS}"
        )
    with torch.device("meta"):  # which has shapes alone
        wanted = GitForCausalLM(config).num_parameters()
    files = [path for path in Path(model).glob("*") if path.suffix in _WEIGHTS]
    held = sum(path.stat().st_size for path in files)
    if files and wanted > held:
        raise ExportError(
            f"{model}: config.json asks for {wanted:,} parameters, and the files of weights have "
            f"{held:,} bytes: take both from the same checkpoint"
        )
    if wanted > _MOST_PARAMETERS:
        raise ExportError(
            f"{model}: config.json asks for {wanted:,} parameters, and an export takes "
            f"{_MOST_PARAMETERS:,}"
        )


def check_tokenizer(model: str, revision: str | None) -> None:
    """Raise ExportError for a tokenizer_config.json that names files of this machine.

    Paths of the machine on which it was saved, which lead nowhere here, are usual.
    """
    asked: dict[str, Any] = get_tokenizer_config(model, revision=revision)
    named = [
        name
        for name, value in asked.items()
        if (name.endswith("_file") and name not in _UNREAD and os.path.exists(str(value)))  # noqa: PTH110
        or (name == "init_inputs" and value)
    ]
    if named:
        raise ExportError(
            f"{model}: {named[0]} in tokenizer_config.json names a file to read in place of the "
            "checkpoint's own: delete it there"
        )
    for name in asked.get("fast_tokenizer_files") or ():
        _check_name(f"{model}: tokenizer_config.json", "a tokenizer", name)


def _check_name(where: object, what: str, name: object) -> None:
    if name is not None and (not isinstance(name, str) or Path(name).name != name):
        raise ExportError(f"{where} names {what} outside the checkpoint ({name!r})")
