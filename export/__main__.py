"""`vignette export MODEL --output engines/<name>`: checkpoint in, proven engine out."""

import argparse
import signal
import sys
from pathlib import Path

from runtime.errors import VignetteError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cleans up
    try:
        _export(_parser().parse_args(arguments))
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        print(
            f"error: exporting needs {package}: install the export extra "
            "(`make export` does, or `pip install -e '.[export,cpu]'`)",
            file=sys.stderr,
        )
        return 2
    except VignetteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vignette export", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "model", nargs="?", help="hub id (such as microsoft/git-base-textcaps) or checkpoint folder"
    )
    what.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="a real checkpoint's shape without a download, for benchmarks: git-base, git-large, "
        "git-base-vqav2, git-large-vqav2, git-base-vatex or git-large-vatex",
    )
    parser.add_argument("--output", type=Path, required=True, help="engine folder to write")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--about", default="", help="a line for the page: what the model knows")
    parser.add_argument("--name", help="what the service calls the model (default: MODEL)")
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER",
        help="pictures such as the service will see, 16 or more (better 200): 8-bit variants are "
        "calibrated on them, and kept if they caption them as PyTorch does",
    )  # fmt: skip
    parser.add_argument(
        "--verify-images", type=int, default=8, metavar="N",
        help="pictures to compare with PyTorch's generate, those of --images first; more take "
        "longer and prove more (default 8)",
    )  # fmt: skip
    parser.add_argument(
        "--verify-tokens", type=int, default=20, metavar="N",
        help="most new tokens for each of them (default 20)",
    )  # fmt: skip
    parser.add_argument("--fp32-only", action="store_true", help="leave the faster variants out")
    parser.add_argument(
        "--no-int8",
        action="store_true",
        help="leave the 8-bit variants out, which are for processors",
    )
    parser.add_argument(
        "--target", choices=("cpu", "cuda", "tensorrt"), default="cpu",
        help="cuda adds fp16 variants for NVIDIA GPUs; tensorrt adds one for TensorRT too, and "
        "compiles it for the GPU that is here (default cpu)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    return parser


def _export(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from export import checkpoint, pictures
    from export.build import Proof, build
    from export.random_weights import random_weights
    from runtime.execution.loader import open_runner, prepare
    from runtime.planning.config import EngineConfig
    from runtime.providers import registry

    if args.random_weights:
        source = random_weights(args.random_weights, args.seed)
    else:
        print(f"loading {args.model}", flush=True)
        source = checkpoint.load(args.model, args.revision)
    source = replace(source, name=args.name or source.name, about=args.about)
    pixels = (
        pictures.from_folder(args.images, source.preprocessing, source.sizes) if args.images else []
    )
    if args.target == "tensorrt":
        registry.require("tensorrt")  # before a long export whose result can't be compiled
    proof = Proof(
        images=args.verify_images,
        new_tokens=args.verify_tokens,
        pixels=tuple(pixels),
        fast=not args.fp32_only,
        int8=not args.no_int8,
        target=args.target,
        cuda=args.target != "cpu" and "cuda" in registry.available(),
    )
    manifest = build(source, args.output, proof)
    if args.target == "tensorrt":
        print("compiling the encoder with TensorRT", flush=True)
        prepared = prepare(args.output, EngineConfig(provider="tensorrt"))
        open_runner(prepared)
    found = manifest.verification
    print(
        f"{args.output}: {found['images']} images of {found['new_tokens']} tokens, the same as "
        f"PyTorch's; logits differ by at most {found['max_logits_difference']:.2g}"
    )
    print(f"serve it with: make serve ENGINE={args.output}")


if __name__ == "__main__":
    sys.exit(main())
