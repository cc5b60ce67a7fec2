"""Checkpoint to engine folder: export, describe, verify; all of it, or nothing.

The engine is made in a folder beside its place and moved there when it is proven, so that a failed
export leaves what was there before.
"""

import errno
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from optimum.exporters.onnx import onnx_export_from_model
from transformers import GitForCausalLM

from export.checkpoint import Checkpoint
from export.errors import ExportError
from export.onnx_config import OPSET, GitDecoderOnnxConfig, GitEncoderOnnxConfig
from export.split import ImagePrefix, TextDecoder
from export.verify import verify
from runtime.manifest import FILE as MANIFEST
from runtime.manifest import Manifest, Variant, sha256

_TASK = "image-to-text"
_PACKAGES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "onnxruntime")


def build(
    checkpoint: Checkpoint,
    output: Path,
    images: int = 8,
    new_tokens: int = 20,
    pixels: list[np.ndarray] | None = None,
) -> Manifest:
    """Export and prove `checkpoint` as engine folder `output` (replaced if it exists).

    images, new_tokens, pixels: what `verify` compares. Raises ExportError (Mismatch among them).
    """
    with _beside(output) as folder:
        print(f"exporting {checkpoint.name} to ONNX", flush=True)
        _write_graphs(checkpoint, folder)
        (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json)
        manifest = _describe(checkpoint, folder)
        print("running ONNX, then PyTorch on the same images", flush=True)
        found = verify(checkpoint, folder, images, new_tokens, pixels)
        manifest = replace(manifest, verification=asdict(found))
        manifest.save(folder)
    return manifest


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A new folder next to `output` that takes its place at the end, or vanishes on an error."""
    _check_replaceable(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as cause:
        raise ExportError(f"can't write to {output.parent}: {cause.strerror}") from cause
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private; a service's user must read this one
        _move_into_place(partial, output)
    except (OSError, RuntimeError) as cause:
        # The exporter writes through C++, whose RuntimeError carries only the system's text.
        full = getattr(cause, "errno", None) == errno.ENOSPC or "No space left" in str(cause)
        if not full:
            raise
        raise ExportError(
            f"the disk that holds {output.parent} is full: free some space and export again"
        ) from cause
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(output: Path) -> None:
    """An engine may be replaced; any other folder is not ours to delete."""
    if not output.name:
        raise ExportError("--output must name a folder of its own, such as engines/my-model")
    if (output / MANIFEST).is_file() or not output.exists():
        return
    if not output.is_dir() or any(output.iterdir()):
        raise ExportError(f"{output} exists and is no engine: choose another --output")


def _move_into_place(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        partial.rename(output)
    except OSError:
        (old / output.name).rename(output)
        raise
    finally:
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)


def _write_graphs(checkpoint: Checkpoint, folder: Path) -> None:
    """Let Optimum export both submodels; of what it writes only the graphs are kept."""
    sizes, how, config = checkpoint.sizes, checkpoint.normalisation, checkpoint.model.config

    def submodels(model: GitForCausalLM) -> dict[str, torch.nn.Module]:
        return {
            "encoder": ImagePrefix(model, how.rescale, how.mean, how.std),
            "decoder": TextDecoder(model, sizes.prefix),
        }

    with tempfile.TemporaryDirectory(dir=folder) as raw, warnings.catch_warnings():
        # Tracing warns of every Python number; whether one mattered is what `verify` finds out.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        onnx_export_from_model(
            checkpoint.model,
            Path(raw),
            opset=OPSET,
            task=_TASK,
            custom_onnx_configs={
                "encoder": GitEncoderOnnxConfig(config, sizes, _TASK),
                "decoder": GitDecoderOnnxConfig(config, sizes, _TASK),
            },
            fn_get_submodels=submodels,
            no_post_process=True,
            do_validation=False,  # ours is stricter, and knows what is undefined in the cache
        )
        for graph in ("encoder", "decoder"):
            (Path(raw) / f"{graph}.onnx").rename(folder / f"{graph}.onnx")


def _describe(checkpoint: Checkpoint, folder: Path) -> Manifest:
    return Manifest(
        model=checkpoint.name,
        revision=checkpoint.revision,
        sizes=checkpoint.sizes,
        tokens=checkpoint.tokens,
        preprocessing=checkpoint.preprocessing,
        tokenizer_sha256=sha256(folder / "tokenizer.json"),
        variants=tuple(
            Variant(graph, "fp32", f"{graph}.onnx", sha256(folder / f"{graph}.onnx"))
            for graph in ("encoder", "decoder")
        ),
        versions={package: version(package) for package in _PACKAGES},
    )
