"""Checkpoint to engine folder: export, verify, describe; all or nothing."""

import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.exporters.onnx import onnx_export_from_model
from transformers import GitForCausalLM

from export.checkpoint import Checkpoint
from export.fp16 import build_fp16
from export.fused_prefix import FusedImagePrefix
from export.gate import exact, judge
from export.graphs import share_weights
from export.modeling import ImagePrefix, TextDecoder
from export.onnx_config import OPSET, GitDecoderOnnxConfig, GitEncoderOnnxConfig
from export.output_folder import replacing
from export.pictures import LEAST_PICTURES, rows
from export.reference import Case
from export.self_test import choose
from export.variants import build_variants, data_name, file_name, variant
from export.verify import check_extent, verify
from export.weights import pool
from runtime.model.manifest import (
    HELPERS,
    TOKENIZER,
    WEIGHTS,
    Combination,
    Manifest,
    Variant,
    read,
    sha256,
)

_TASK = "image-to-text"
_FP32 = ("fp32", "float32")
_FUSED = "encoder.fused.onnx"  # fp32, only an intermediate step to fp16
_CALIBRATION = 128  # most pictures, and at most half of all; the gate uses the others
_PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")


@dataclass(frozen=True, slots=True)
class Proof:
    """How much to compare with PyTorch, and which variants to build.

    images, new_tokens: number of images, and most tokens of each, that `verify` compares.
    pixels: uint8 encoder rows of real pictures, for calibration, the gate, and `verify` first.
    fast: build faster variants too: 8-bit for CPUs and, for a GPU target, fp16. Skipped without
        `pixels`, unless the weights are random.
    int8: include the 8-bit variants among them.
    target: cpu, cuda, or tensorrt (which includes cuda).
    cuda: whether this machine has a GPU to judge fp16 on.
    """

    images: int = 8
    new_tokens: int = 20
    pixels: tuple[np.ndarray, ...] = ()
    fast: bool = True
    int8: bool = True
    target: str = "cpu"
    cuda: bool = False


def build(checkpoint: Checkpoint, output: Path, proof: Proof | None = None) -> Manifest:
    """Export and prove `checkpoint` as engine folder `output` (replaced if it exists).

    Raises ExportError, including Mismatch.
    """
    proof = proof or Proof()
    check_extent(checkpoint, proof.images, proof.new_tokens)
    with replacing(output) as folder:
        print(f"exporting {checkpoint.name} to ONNX", flush=True)
        _write_graphs(checkpoint, folder, fused=proof.fast and proof.target != "cpu")
        for graph in ("encoder", "decoder"):
            share_weights(folder / file_name(graph, *_FP32), data_name(graph, "fp32"))
        (folder / TOKENIZER).write_text(checkpoint.tokenizer_json)
        print("running ONNX, then PyTorch on the same images", flush=True)
        found = verify(checkpoint, folder, proof.images, proof.new_tokens, list(proof.pixels))
        fast, fp32_nodes = _faster_variants(checkpoint, folder, proof)
        kept = [exact(found.images), *fast]
        manifest = replace(
            _describe(checkpoint, folder, kept),
            self_test=choose(checkpoint, folder, kept),
            verification=asdict(found) | {"fp32_nodes": fp32_nodes},
        )
        manifest.save(folder)
        read(folder)  # raises for what no engine could be opened with
    return manifest


def _faster_variants(
    checkpoint: Checkpoint, folder: Path, proof: Proof
) -> tuple[list[Combination], dict[str, list[str]]]:
    """Build the faster variants and judge them, if there are pictures or random weights.

    Returns the combinations that passed, and per fp16 file the nodes kept in fp32.
    """
    if not proof.fast or (proof.target == "cpu" and not proof.int8):
        return [], {}
    pixels = list(proof.pixels)
    if not pixels and checkpoint.trained and checkpoint.sizes.frames:
        print("no faster variants: judging them on pictures is for single-image models so far")
        return [], {}
    if not pixels and checkpoint.trained:
        print(
            f"no 8-bit or fp16 variants, which are several times as fast: they are calibrated and "
            f"judged on pictures, so give --images a folder with {LEAST_PICTURES} or more"
        )
        return [], {}
    made = islice(rows(np.random.default_rng(1), checkpoint.sizes, pixels), LEAST_PICTURES)
    pixels = pixels or list(made)
    calibrating = min(_CALIBRATION, len(pixels) // 2)
    variants: list[Variant] = []
    if proof.int8:
        variants += build_variants(checkpoint, folder, pixels[:calibrating], proof.new_tokens)
    cases = [Case(row, [checkpoint.tokens.bos]) for row in pixels]
    fp32_nodes: dict[str, list[str]] = {}
    if proof.target != "cpu":
        half, fp32_nodes = build_fp16(
            checkpoint, folder, folder / _FUSED, cases[:calibrating], proof.new_tokens,
            plain=proof.target == "tensorrt",
        )  # fmt: skip
        variants += half
    judged = cases[calibrating:]
    kept = judge(checkpoint, folder, variants, judged, proof.new_tokens, proof.cuda)
    return kept, fp32_nodes


def _write_graphs(checkpoint: Checkpoint, folder: Path, fused: bool) -> None:
    """Export the submodels with Optimum, keeping only the graphs.

    fused: export a second encoder too, with nodes for CUDA.
    """
    sizes, how, config = checkpoint.sizes, checkpoint.normalisation, checkpoint.model.config

    configs = {
        "encoder": GitEncoderOnnxConfig(config, sizes, _TASK),
        "decoder": GitDecoderOnnxConfig(config, sizes, _TASK),
    }
    if fused:
        configs["encoder.fused"] = GitEncoderOnnxConfig(config, sizes, _TASK)

    def submodels(model: GitForCausalLM) -> dict[str, torch.nn.Module]:
        normalised = model, how.rescale, how.mean, how.std
        modules = {
            "encoder": ImagePrefix(*normalised),
            "decoder": TextDecoder(model, sizes.prefix),
            "encoder.fused": FusedImagePrefix(*normalised),
        }
        return {name: modules[name] for name in configs}

    with tempfile.TemporaryDirectory(dir=folder) as raw, warnings.catch_warnings():
        # Tracing warns of every Python number; `verify` would detect one that mattered.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        onnx_export_from_model(
            checkpoint.model,
            Path(raw),
            opset=OPSET,
            task=_TASK,
            custom_onnx_configs=configs,
            fn_get_submodels=submodels,
            no_post_process=True,
            do_validation=False,  # `verify` is stricter, and ignores undefined cache positions
        )
        for graph in configs:
            (Path(raw) / f"{graph}.onnx").rename(folder / f"{graph}.onnx")


def _describe(checkpoint: Checkpoint, folder: Path, combinations: list[Combination]) -> Manifest:
    """The manifest of the used variants; deletes the files of all others."""
    sizes = pool(folder, [v.file for v in _used(combinations)])
    variants = tuple(replace(v, weights=sizes[v.file]) for v in _used(combinations))
    files = {TOKENIZER, WEIGHTS, *(v.file for v in variants)}
    for path in folder.iterdir():
        if path.name not in files:
            path.unlink()
    return Manifest(
        model=checkpoint.name,
        revision=checkpoint.revision,
        about=checkpoint.about,
        sizes=checkpoint.sizes,
        tokens=checkpoint.tokens,
        preprocessing=checkpoint.preprocessing,
        files={name: sha256(folder / name) for name in sorted(files)},
        variants=variants,
        combinations=tuple(combinations),
        # The package may be onnxruntime or onnxruntime-gpu.
        versions={package: version(package) for package in _PACKAGES}
        | {"onnxruntime": onnxruntime.__version__},
    )


def _used(combinations: list[Combination]) -> tuple[Variant, ...]:
    wanted = {("encoder", c.encoder, c.cache) for c in combinations}
    wanted |= {("decoder", c.decoder, c.cache) for c in combinations}
    on_device = [c for c in combinations if c.cache == "float16"]
    wanted |= {(graph, c.decoder, c.cache) for c in on_device for graph in HELPERS}
    return tuple(variant(*key) for key in sorted(wanted))
